"""The tables of a run: what is known of every record, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qwen_image_fast.extras import needed_for

from .filters.order import SCORED

with needed_for("filtering a data set"):
    import pyarrow as pa
    import pyarrow.parquet as pq

AUDIT = pa.schema(
    [
        ("id", pa.string()), ("origin", pa.string()), ("source", pa.string()), ("category", pa.string()),
        ("height", pa.int32()), ("width", pa.int32()), ("text_language", pa.string()), ("kept", pa.bool_()),
        ("stage", pa.int8()), ("filter", pa.string()), ("reason", pa.string()),
        *((name, pa.float64()) for name in SCORED),
    ]
)  # fmt: skip
# While the run goes on, also: the place in the taxonomy, the file's size, the perceptual hash, what filters added to
# the metadata.
ROWS = pa.schema(
    [*AUDIT, ("node", pa.string()), ("bytes", pa.int64()), ("hash", pa.uint64()), ("tags", pa.string())]
)  # fmt: skip
_AT_ONCE = 4096


class AuditWriter:
    """Writes rows as they come to an open file; a context."""

    def __init__(self, file: BinaryIO, schema: pa.Schema = AUDIT):
        self._schema, self._rows = schema, list[dict[str, Any]]()
        self._table = pq.ParquetWriter(file, schema)

    def __enter__(self) -> AuditWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._table.close()

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._table.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
