"""A table of pictures: JSON lines or parquet, with a path or bytes, and captions, in each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.data.collect import LARGEST_FILE, record_of_line, record_of_row
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.screen import Rejected, Screen
from qwen_image_fast.training.randomness import epoch_position
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.sample import Sample

SUFFIXES = (".jsonl", ".parquet")


class JsonLines:
    """The rows of a file of JSON lines; 8 bytes of memory for each."""

    def __init__(self, file: Path, column: str):
        self.file, self.column = file, column
        self.numbers: list[int] = []
        offsets, offset = [], 0
        with open(file, "rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LARGEST_FILE), b""), 1):
                if line.strip():
                    offsets.append(offset)
                    self.numbers.append(number)
                offset += len(line)
        self.offsets = np.array(offsets, np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, place: int) -> Record:
        number = self.numbers[place]
        try:
            with open(self.file, "rb") as lines:
                lines.seek(int(self.offsets[place]))
                line = lines.readline(LARGEST_FILE)
        except OSError as error:
            return Record(b"", origin=f"{self.file.name}:{number}", fault=f"line {number} cannot be read: {error}")
        return record_of_line(self.file, line, number, self.column, {})


class Parquet:
    """The rows of a parquet file. A row is read with its row group: tables whose groups hold thousands of pictures are
    read faster as shards, which `data filter` writes."""

    def __init__(self, file: Path, column: str):
        with needed_for(f"reading {file}"):
            import pyarrow as pa
            import pyarrow.parquet as pq

        self.file, self.column = file, column
        try:
            with pq.ParquetFile(file) as table:
                sizes = [table.metadata.row_group(k).num_rows for k in range(table.metadata.num_row_groups)]
                columns = table.schema_arrow.names
        except (pa.ArrowInvalid, OSError) as error:
            raise RecipeError(f"recipe: data.source {file} cannot be read: {error}") from error
        if column not in columns:
            raise RecipeError(
                f"recipe: data.options.image_column must be a column of {file}: {', '.join(columns)}; got {column!r}"
            )
        self.ends = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, place: int) -> Record:
        import pyarrow as pa
        import pyarrow.parquet as pq

        origin = f"{self.file.name}:{place}"
        group = int(np.searchsorted(self.ends, place, side="right")) - 1
        try:
            with pq.ParquetFile(self.file) as table:
                rows = table.read_row_group(group).slice(place - int(self.ends[group]), 1)
            (fields,) = rows.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            return Record(b"", origin=origin, fault=f"row {place} cannot be read: {error}")
        return record_of_row(self.file, fields, fields.pop(self.column, None), self.column, origin, {})


class Table:
    """Pictures and captions of a table, in an order of its own in each epoch.

    Args:
        path: of a `.jsonl` or `.parquet` file. screen: says which pictures are used.
        image_column: has the picture's path, relative to the table, or its bytes; see `data.collect.collect`. Captions
            are in `caption` (the raw one) or `captions` (an object); the best one is used.

    Raises:
        RecipeError: the table cannot be read, has no rows, or no caption in its first one.
        ImportError: pyarrow, for parquet, is not installed.
    """

    def __init__(self, path: str, screen: Screen | None = None, image_column: str = "image"):
        self.screen = screen or Screen({})
        file = Path(path)
        reader: Any = JsonLines if file.suffix.lower() == ".jsonl" else Parquet
        self.rows = reader(file, image_column)
        if not len(self.rows):
            raise RecipeError(f"recipe: data.source must have rows, got {path}, which has none")
        first = self.rows.read(0)
        if not (first.caption or first.fault):
            raise RecipeError(
                f"recipe: rows of data.source need a caption or captions, {first.origin} has none; its other fields: "
                f"{', '.join(first.metadata) or 'none'}"
            )

    def sample(self, seed: int, index: int) -> Sample:
        record = self.rows.read(epoch_position(seed, index, len(self.rows)))
        if not (record.caption or record.fault):
            raise Rejected(record.origin, "no_caption: the row has no caption")
        return Sample(self.screen.pixels(record), record.caption, origin=record.origin)
