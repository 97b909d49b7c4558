"""The seven stages in order: sources in, shards and an audit of every record out."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write

from .collect import collect
from .disk import full_disk_is_a_sentence
from .filters.balance import Balance
from .filters.base import Filter
from .filters.order import FILTER_NAMES, FILTERS
from .judge import build_filters, judge, rejection
from .recipe import FilterRecipe
from .record import Record
from .shards import write_shards

with needed_for("filtering a data set"):
    import pyarrow as pa
    import pyarrow.parquet as pq

AUDIT = pa.schema(
    [
        ("id", pa.string()), ("origin", pa.string()), ("source", pa.string()), ("category", pa.string()),
        ("height", pa.int32()), ("width", pa.int32()), ("text_language", pa.string()), ("kept", pa.bool_()),
        ("stage", pa.int8()), ("filter", pa.string()), ("reason", pa.string()),
        *((f.name, pa.float64()) for f in FILTERS),
    ]
)  # fmt: skip
_AUDIT_ROWS = 4096


@dataclass(frozen=True)
class Result:
    """seen, kept: records. rejected: how many went by each filter, in the order of the stages."""

    seen: int
    kept: int
    rejected: dict[str, int]


def run_filters(
    recipe: FilterRecipe,
    out: str | Path,
    *,
    filters: Callable[[FilterRecipe, Path], list[Filter]] = build_filters,
    progress: Callable[[], Any] = lambda: None,
    judged: Callable[[Record, dict[str, Any]], Any] = lambda record, row: None,
    rejected: Callable[[Record, dict[str, Any]], Any] = lambda record, row: None,
) -> Result:
    """Write what passes to `out/shards` (see `shards.write_shards`) and every record's fate to `out/audit.parquet`.

    Records that pass the filters are kept in `out` until the balance of stages 6 and 7 has seen them all, so the disk
    holds them twice for a while. Memory does not grow with their number. The same recipe gives the same bytes.

    Args:
        filters: makes the filters; a function of your own can add models to `build_filters`.
        progress: called after each record.
        judged: called with each record and its row of the audit, before the balance of stages 6 and 7.
        rejected: called with each record that goes, and its row.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    balance = recipe.balance
    by_category = 6 in recipe.stages and "category_balance" not in recipe.without and bool(balance.categories)
    by_node = 7 in recipe.stages and "taxonomy" not in recipe.without and balance.power < 1
    with full_disk_is_a_sentence(out), tempfile.TemporaryDirectory(prefix=".filtering-", dir=out) as name:
        work = Path(name)
        table = Balance(work, balance.categories, balance.tail, balance.power, recipe.seed)
        chain = filters(recipe, work)
        first_audit = work / "audit.parquet"

        def first_pass(write_row: Callable[[dict[str, Any]], None]) -> Iterator[Record]:
            number = itertools.count()
            for source in recipe.sources:
                for found in collect(**dataclasses.asdict(source)):
                    record, row = judge(found, chain, recipe.curation.max_pixels)
                    write_row(row)
                    judged(record, row)
                    if row["kept"]:
                        table.add(next(number), record, row.get(balance.best_by))
                        yield record
                    else:
                        rejected(record, row)
                    progress()

        atomic_write(first_audit, lambda file: _audited(file, first_pass, work / "kept", recipe.shard_records))
        counts: collections.Counter[str] = collections.Counter()

        def second_pass(write_row: Callable[[dict[str, Any]], None]) -> Iterator[Record]:
            reasons, kept = table.reasons(by_category, by_node), _kept(work / "kept")
            for row in _rows(first_audit):
                record = dataclasses.replace(next(kept), origin=row["origin"]) if row["kept"] else None
                if record is not None and (reason := next(reasons)):
                    row.update(rejection(*reason))
                    rejected(record, row)
                counts[row["filter"] or ""] += 1
                write_row(row)
                if record is not None and row["kept"]:
                    yield record

        atomic_write(
            out / "audit.parquet", lambda file: _audited(file, second_pass, out / "shards", recipe.shard_records)
        )
    ordered = {name: counts[name] for name in FILTER_NAMES if counts[name]}
    return Result(sum(counts.values()), counts[""], ordered)


def _audited(
    file: BinaryIO,
    records: Callable[[Callable[[dict[str, Any]], None]], Iterator[Record]],
    folder: Path,
    shard_records: int,
) -> None:
    """Write shards of records, and to `file` the audit rows that making them hands to its argument."""
    with pq.ParquetWriter(file, AUDIT) as audit:
        rows: list[dict[str, Any]] = []

        def write_row(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == _AUDIT_ROWS:
                audit.write_table(pa.Table.from_pylist(rows, AUDIT))
                rows.clear()

        write_shards(records(write_row), folder, shard_records=shard_records)
        audit.write_table(pa.Table.from_pylist(rows, AUDIT))


def _rows(audit: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(audit) as table:
        for batch in table.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _kept(folder: Path) -> Iterator[Record]:
    """The records of the first pass, as they went in; none where every record was rejected."""
    return collect(folder) if any(folder.glob("shard-*.tar")) else iter(())
