"""Judging parts: the same code in one process, in several, and on a cluster. Models are loaded once per process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from qwen_image_fast.files import atomic_write
from qwen_image_fast.training import blas
from qwen_image_fast.training.worker_pool import worker_pool

from .audit import ROWS, AuditWriter
from .caption_sets import read_in_sets
from .filters.base import Filter
from .filters.duplicates import PLAIN
from .journal import Attempt, Journal
from .judge import FilterFailure, judge, rejection
from .parts import Part
from .recipe import FilterRecipe
from .record import Record

MakeFilters = Callable[[FilterRecipe], list[Filter]]
# So many records in a row that a filter failed on are the filter's fault.
_MOST_FAILURES = 20
_DEATHS = 1


class PartJudge:
    """Judges a part and leaves its rows in the journal, all or none.

    A filter that raises an error rejects the record, which says so. A record that ends the whole process (a decoder's
    crash, memory) is found when the part is judged again: then it is noted before each record which it is, and one at
    which that process ends too, twice, is rejected unseen.

    Args:
        recipe: of the run. journal: where it is. filters: makes the filters, see `judge.build_filters`.
    """

    def __init__(self, recipe: FilterRecipe, journal: Journal, filters: MakeFilters):
        self._recipe, self._journal = recipe, journal
        self._filters = filters(recipe)
        blas.on_one_thread("filtering a data set")  # of all the libraries that the filters have loaded
        near = "near_duplicate" not in recipe.without
        self._min_entropy = max(recipe.quality.min_entropy, PLAIN) if near else None
        self._failures = 0

    def __call__(self, number: int, part: Part, progress: Callable[[int], Any] = lambda count: None) -> int:
        """Judge part `number`, unless its rows are there, and return how many records it has.

        Args:
            progress: called with 1 after each record.

        Raises:
            RuntimeError: a filter failed on 20 records in a row.
        """
        if not self._journal.rows(number).exists():
            before = self._journal.attempt(number)
            if before is None:
                self._journal.attempting(number, Attempt())

            def write_all(file: Any) -> None:
                with AuditWriter(file, ROWS) as table:
                    for row in self._rows(number, part, before):
                        table.write(row)
                        progress(1)

            atomic_write(self._journal.rows(number), write_all)
            self._journal.done(number)
        return part.count

    def _rows(self, number: int, part: Part, before: Attempt | None) -> Iterator[dict[str, Any]]:
        for place, record in enumerate(read_in_sets(part, self._recipe)):
            if before is not None:
                deaths = before.deaths + 1 if place == before.place else 0
                if deaths > _DEATHS:
                    reason = "whatever judged it ended, three times: a decoder that crashes, or too little memory"
                    yield _row(record) | rejection("broken_file", reason)
                    continue
                self._journal.attempting(number, Attempt(place, deaths))
            yield self._judged(record)

    def _judged(self, record: Record) -> dict[str, Any]:
        try:
            judged, row = judge(record, self._filters, self._recipe.curation.max_pixels, self._min_entropy)
            self._failures = 0
            tags = {name: judged.metadata[name] for name in judged.metadata if name not in record.metadata or
                    judged.metadata[name] != record.metadata[name]}  # fmt: skip
            known = {"node": _node(record), "bytes": len(record.image)}
            return row | known | {"tags": json.dumps(tags, ensure_ascii=False) if tags else None}
        except FilterFailure as error:
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                raise RuntimeError(
                    f"filter: {error.filter} failed on {self._failures} records in a row, at last on {record.origin}: "
                    f"{error}; repair it or add it to the recipe's `without`, and run the same again to go on"
                ) from error
            return error.row | {"node": _node(record)} | rejection(error.filter, str(error))


def _row(record: Record) -> dict[str, Any]:
    return {"id": record.id, "origin": record.origin, "source": record.source, "category": record.category}


def _node(record: Record) -> str:
    return str(record.metadata.get("node") or record.category)


def judge_parts(
    recipe: FilterRecipe, journal: Journal, filters: MakeFilters, workers: int, progress: Callable[[int], Any]
) -> None:
    """Judge what is missing: in this process, or in `workers` others.

    Args:
        progress: called with the number of further records that are judged.

    Raises:
        RuntimeError: a filter fails on everything, or the processes end whatever they judge.
    """
    if workers == 1:
        one = PartJudge(recipe, journal, filters)
        for number, part in journal.missing():
            one(number, part, progress)
        return
    waiting = journal.missing()
    while suspects := _with_pool(recipe, journal, filters, workers, progress, waiting):
        # One of them ended its process, and with it the others'. Alone, each ends its own.
        for number, part in suspects:
            _alone(recipe, journal, filters, number, part)
            progress(part.count)


def _with_pool(
    recipe: FilterRecipe, journal: Journal, filters: MakeFilters, workers: int, progress: Callable[[int], Any],
    waiting: Iterator[tuple[int, Part]],
) -> list[tuple[int, Part]]:  # fmt: skip
    """Judge parts until there are none, or until a process ends; those that were then under way."""
    under_way: dict[Future[int], tuple[int, Part]] = {}
    threads = max(1, (os.cpu_count() or 1) // workers)
    with worker_pool(workers, _start, recipe, journal.folder.parent, filters, threads) as pool:
        try:
            for number, part in waiting:
                under_way[pool.submit(_judge_part, number, part)] = number, part
                if len(under_way) >= 2 * workers:
                    _settle(under_way, progress)
            while under_way:
                _settle(under_way, progress)
        except BrokenProcessPool:
            lost = {**dict(under_way.values()), number: part}
            return [(one, its) for one, its in sorted(lost.items()) if not journal.rows(one).exists()]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return []


def _settle(under_way: dict[Future[int], tuple[int, Part]], progress: Callable[[int], Any]) -> None:
    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
        progress(future.result())
        del under_way[future]


def _alone(recipe: FilterRecipe, journal: Journal, filters: MakeFilters, number: int, part: Part) -> None:
    ended = 0
    while True:
        before = journal.attempt(number)
        try:
            with worker_pool(1, _start, recipe, journal.folder.parent, filters, os.cpu_count() or 1) as pool:
                pool.submit(_judge_part, number, part).result()
            return
        except BrokenProcessPool as error:
            ended = ended + 1 if journal.attempt(number) == before else 0
            if ended > _DEATHS:
                raise RuntimeError(
                    "filter: the processes that judge end before they have begun: is there enough memory for "
                    "--workers? Run the same again with fewer to go on"
                ) from error


_in_this_process: list[Callable[[], PartJudge]] = []  # of a worker: what makes its judge, then the judge itself


def _start(recipe: FilterRecipe, out: Path, filters: MakeFilters, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    made: list[PartJudge] = []

    def judge_of_process() -> PartJudge:
        if not made:
            made.append(PartJudge(recipe, Journal(out), filters))
        return made[0]

    _in_this_process.append(judge_of_process)


def _judge_part(number: int, part: Part) -> int:
    return _in_this_process[0]()(number, part)
