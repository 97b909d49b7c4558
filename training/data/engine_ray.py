"""The run on Ray Data: parts are rows that actors judge, duplicates are found by exchanges between the machines.

The journal, the sources and the models must have the same paths on all machines, as on a shared file system. What is
compared in the end, a row for each record that passed every filter, is in this process, which also writes the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.extras import needed_for

from .compare import Pairs
from .filters.duplicates import masks, pairs_within
from .journal import Journal
from .judging import MakeFilters, PartJudge
from .parts import Part, part_of, text_of
from .recipe import FilterRecipe, RayRecipe
from .timeline import Timeline

_MOST_BLOCKS = 4096
_ROWS = 2**16  # of a block of what is compared
_BUCKETS = 64
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: spreads keys over the buckets


class RayEngine:
    """`judge`, `groups` and `pairs` of `engine.Engine` on Ray Data.

    A machine or an actor that dies is replaced, and its parts are judged again; those that were done are not.

    Args:
        recipe: of the cluster and of one actor.

    Raises:
        ImportError: Ray Data is not installed.
    """

    def __init__(self, recipe: RayRecipe):
        with needed_for("data filter --engine ray"):
            import pandas  # noqa: F401  which Ray Data asks for, and Ray alone does not bring
            import ray
            import ray.data
        self._ray, self._recipe, self._started = ray, recipe, not ray.is_initialized()
        if self._started:
            ray.init(address=recipe.address or None, include_dashboard=False, log_to_driver=False,
                     logging_level="ERROR")  # fmt: skip
        self.timeline = Timeline()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the run has one of its own

    def judge(
        self, recipe: FilterRecipe, journal: Journal, filters: MakeFilters, workers: int, progress: Callable[[int], Any]
    ) -> None:
        """As `judging.judge_parts`; workers: actors."""
        rows = [{"number": number, "part": text_of(part)} for number, part in journal.missing()]
        if not rows:
            return
        parts = self._ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
        out = journal.folder.parent.absolute()
        judged = parts.map_batches(
            _Judge, fn_constructor_args=(recipe, out, filters), batch_size=1, batch_format="numpy",
            concurrency=min(workers, len(rows)), num_cpus=self._recipe.cpus, num_gpus=self._recipe.gpus,
        )  # fmt: skip
        try:
            for row in judged.iter_rows():
                self.timeline.add(row["machine"], row["worker"], row["start"], row["end"], int(row["count"]))
                progress(int(row["count"]))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise RuntimeError(str(cause)) from error

    def groups(self, keys: np.ndarray) -> np.ndarray:
        """As `compare.local_groups`: an exchange by the first bits of the keys."""
        groups = np.arange(len(keys))

        def equal(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            _, first, which = np.unique(rows["key"], return_index=True, return_inverse=True)
            head = rows["place"][first][which]
            same = head != rows["place"]
            return {"place": rows["place"][same], "head": head[same]}

        if len(keys):
            words = keys.view(np.uint64).reshape(len(keys), -1)
            first = (words[:, 0] % np.uint64(_BUCKETS)).astype(np.int64)
            # As objects: Arrow ends the bytes of a fixed-size array at the first zero.
            table = {"place": np.arange(len(keys)), "key": keys.astype(object), "bucket": first}
            with self._timed("exact duplicates", len(keys)):
                for found in self._exchanged(table, None, equal):
                    groups[found["place"].astype(np.int64)] = found["head"].astype(np.int64)
        return groups

    def pairs(self, hashes: np.ndarray, radius: int) -> Iterator[Pairs]:
        """As `duplicates.near_pairs`: every hash goes to a bucket for each mask, by the bits that the mask leaves."""
        chosen = [np.uint64(mask) for mask in masks(radius)]

        def spread(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            parts = [((rows["hash"] & mask) * _MIX) >> np.uint64(58) for mask in chosen]
            buckets = [number * _BUCKETS + part.astype(np.int64) for number, part in enumerate(parts)]
            return {**{name: np.tile(rows[name], len(chosen)) for name in rows}, "bucket": np.concatenate(buckets)}

        def near(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            number = int(rows["bucket"][0]) // _BUCKETS
            order = np.argsort(rows["hash"] & chosen[number], kind="stable")
            found = list(pairs_within(rows["hash"][order], rows["place"][order], chosen[: number + 1], radius))
            nothing = np.empty(0, np.int64)
            first, second, bits = (np.concatenate([one[n] for one in found] or [nothing]) for n in range(3))
            return {"first": first.astype(np.int64), "second": second.astype(np.int64), "bits": bits.astype(np.int64)}

        if len(hashes):
            table = {"place": np.arange(len(hashes)), "hash": hashes}
            with self._timed("near duplicates", len(hashes)):
                for found in self._exchanged(table, spread, near):
                    yield tuple(found[name].astype(np.int64) for name in ("first", "second", "bits"))  # type: ignore[misc]

    @contextmanager
    def _timed(self, what: str, records: int) -> Iterator[None]:
        start = time.time()
        yield
        self.timeline.add("", what, start, time.time(), records)

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()

    def _exchanged(
        self,
        table: dict[str, np.ndarray],
        spread: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None,
        work: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    ) -> Iterator[dict[str, np.ndarray]]:
        """What `work` makes of the rows of each bucket, which `spread` may name."""
        with needed_for("data filter --engine ray"):
            import pyarrow as pa

        count = len(table["place"])
        blocks = [
            pa.table({name: pa.array(column[start : start + _ROWS]) for name, column in table.items()})
            for start in range(0, count, _ROWS)
        ]
        data = self._ray.data.from_arrow(blocks)
        if spread is not None:
            data = data.map_batches(spread, batch_format="numpy", batch_size=_ROWS)
        found = data.groupby("bucket", max(1, min(_BUCKETS, count // _ROWS))).map_groups(work, batch_format="numpy")
        yield from found.iter_batches(batch_format="numpy", batch_size=None)


class _Judge:
    """An actor: models are loaded once."""

    def __init__(self, recipe: FilterRecipe, out: Path, filters: MakeFilters):
        import ray

        self._judge = PartJudge(recipe, Journal(out), filters)
        context = ray.get_runtime_context()
        self._where = {"machine": context.get_node_id(), "worker": context.get_actor_id()}

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts: list[tuple[int, Part]] = [(int(n), part_of(str(text))) for n, text in zip(rows["number"], rows["part"])]
        start = time.time()
        count = sum(self._judge(number, part) for number, part in parts)
        values = {"count": count, "start": start, "end": time.time(), **self._where}
        return {name: np.array([value]) for name, value in values.items()}
