"""The seven stages: sources in, shards and an audit of every record out.

First every record is judged by itself, part by part, and what is known of it is kept on the disk. Then those that
passed are compared with each other. At last the sources are read again, and the result is written.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image_fast.files import atomic_write

from .audit import AuditWriter, rows_of
from .caption_sets import read_in_sets
from .compare import Fate, columns, compare, compares, read_survivors
from .disk import full_disk_is_a_sentence
from .engine import Engine
from .filters.order import FILTER_NAMES, FILTERS
from .journal import Journal
from .judge import build_filters, rejection
from .judging import MakeFilters
from .parts import same
from .recipe import FilterRecipe
from .record import Record
from .shards import write_shards

LOCAL = Engine()
Heard = Callable[[Record, dict[str, Any]], Any]


@dataclass(frozen=True)
class Result:
    """seen, kept: records. rejected: how many went by each filter, in the order of the stages. unmeasured: filters of
    the recipe that gave no record a score and rejected none: they lack a model, or nothing was for them."""

    seen: int
    kept: int
    rejected: dict[str, int]
    unmeasured: tuple[str, ...] = ()


class _Counts:
    """What a `Result` is made of, row by row."""

    def __init__(self, recipe: FilterRecipe):
        self._by: collections.Counter[str] = collections.Counter()
        self._silent = [f.name for f in FILTERS if f.stage in recipe.stages and f.name not in recipe.without]

    def add(self, row: dict[str, Any]) -> None:
        by = row["filter"] or ""
        self._by[by] += 1
        self._silent = [name for name in self._silent if row[name] is None and name != by]

    def result(self) -> Result:
        ordered = {name: self._by[name] for name in FILTER_NAMES if self._by[name]}
        return Result(self._by.total(), self._by[""], ordered, tuple(self._silent))


def run_filters(
    recipe: FilterRecipe,
    out: str | Path,
    *,
    filters: MakeFilters = build_filters,
    engine: Engine = LOCAL,
    workers: int = 1,
    progress: Callable[[int, int], Any] = lambda count, total: None,
    judged: Heard = lambda record, row: None,
    beside: Callable[[Path], Any] = lambda folder: None,
) -> Result:
    """Write what passes to `out/shards` (see `shards.write_shards`) and every record's fate to `out/audit.parquet`.

    A killed run goes on with the same call: parts that were judged are not judged again. The result appears when it is
    whole, the audit last. The same recipe gives the same bytes, whatever the workers and however often it was killed.
    Sources are read twice and must not change in between.

    Args:
        filters: makes the filters; a function of your own can add models to `build_filters`. Of a module, where there
            are workers.
        engine: what carries the run, see `engine.engine_of`.
        workers: processes that decode and judge; 1: this one, or one actor.
        progress: called with the number of further records that are judged, and of all.
        judged: called with each record and its row of the audit, in order, when all is known.
        beside: called with the folder of the unfinished result; what it writes there appears with it.

    Raises:
        ValueError: `out` was begun with another recipe, or a source has changed since.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out)
    with full_disk_is_a_sentence(out):
        total = journal.begin(recipe)
        missing = sum(part.count for _, part in journal.missing())
        progress(total - missing, total)
        engine.judge(recipe, journal, filters, workers, lambda count: progress(count, total))
        result = journal.result()
        found = _write(recipe, journal, engine, result, judged)
        beside(result)
        journal.appear()
        journal.end()
    return found


def try_filters(
    recipe: FilterRecipe,
    *,
    filters: MakeFilters = build_filters,
    engine: Engine = LOCAL,
    workers: int = 1,
    progress: Callable[[int, int], Any] = lambda count, total: None,
    heard: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> Result:
    """What `run_filters` would keep and reject; nothing stays on the disk.

    Args:
        heard: called with each row of the audit that there would be.
    """
    counts = _Counts(recipe)
    with tempfile.TemporaryDirectory(prefix="filtering-") as name, full_disk_is_a_sentence(Path(name)):
        journal = Journal(Path(name))
        total = journal.begin(recipe)
        engine.judge(recipe, journal, filters, workers, lambda count: progress(count, total))
        for rows in judged_rows(recipe, journal, engine):
            for row in rows:
                counts.add(row)
                heard(row)
    return counts.result()


def fates(recipe: FilterRecipe, journal: Journal, engine: Engine) -> Iterator[Fate]:
    """Of the records that every filter let pass, in order, at the least."""
    if not compares(recipe):
        return itertools.repeat(Fate())  # nothing of any record is in memory
    found = read_survivors(journal.tables(columns(recipe)), recipe.balance.best_by)
    table = journal.folder / "balance.sqlite"
    table.unlink(missing_ok=True)
    return compare(found, recipe, journal.folder, groups=engine.groups, pairs=engine.pairs)


def judged_rows(recipe: FilterRecipe, journal: Journal, engine: Engine) -> Iterator[Iterator[dict[str, Any]]]:
    """The finished rows of each part, in order."""
    fate = fates(recipe, journal, engine)

    def finished(number: int) -> Iterator[dict[str, Any]]:
        for row in rows_of(journal.rows(number)):
            if row["kept"]:
                end = next(fate)
                row.update(exact_duplicate=end.exact, near_duplicate=end.near)
                if end.filter is not None and end.reason is not None:
                    row.update(rejection(end.filter, end.reason))
            yield row

    return (finished(number) for number, _ in journal.parts())


def _write(recipe: FilterRecipe, journal: Journal, engine: Engine, result: Path, judged: Heard) -> Result:
    counts = _Counts(recipe)

    def write_all(file: Any) -> None:
        with AuditWriter(file) as audit:

            def kept() -> Iterator[Record]:
                for (_, part), rows in zip(journal.parts(), judged_rows(recipe, journal, engine), strict=True):
                    records = read_in_sets(part, recipe)
                    for row in rows:
                        record = _with_tags(same(next(records, None), row, "filter"), row)
                        counts.add(row)
                        audit.write(row)
                        judged(record, row)
                        if row["kept"]:
                            yield record

            write_shards(kept(), result / "shards", shard_records=recipe.shard_records)

    atomic_write(result / "audit.parquet", write_all)
    return counts.result()


def _with_tags(record: Record, row: dict[str, Any]) -> Record:
    """With what the filters found."""
    tags = json.loads(row["tags"] or "{}")
    return dataclasses.replace(record, metadata={**record.metadata, **tags}) if tags else record
