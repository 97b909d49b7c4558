"""Tables of pictures or of edits: JSON lines, CSV or parquet, with paths or bytes and captions in each row."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.data.collect import (
    LARGEST_FILE,
    csv_rows,
    fields_of_line,
    image_column,
    path_of,
    picture_of,
    record_of_row,
)
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.example import Example

SUFFIXES = (".jsonl", ".csv", ".parquet")
INSTRUCTIONS = ("instruction", "edit_prompt", "prompt")
REFERENCES = ("references", "reference", "source_image", "original_image", "input_image", "before")
EDITED = ("image", "file_name", "edited_image", "target_image", "after", "output_image")


class Unreadable(ValueError):
    """A sentence about a row."""


class Rows(Protocol):
    file: Path

    def __len__(self) -> int: ...

    def origin(self, place: int) -> str: ...

    def fields(self, place: int) -> dict[str, Any]:
        """Those of a row; `Unreadable` where it has none."""


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

    def origin(self, place: int) -> str:
        return f"{self.file.name}:{self.numbers[place]}"

    def fields(self, place: int) -> dict[str, Any]:
        number = self.numbers[place]
        try:
            with open(self.file, "rb") as lines:
                lines.seek(int(self.offsets[place]))
                return fields_of_line(lines.readline(LARGEST_FILE), self.column)
        except (OSError, ValueError) as error:
            raise Unreadable(f"line {number} cannot be read: {error}") from error


class Csv:
    """The rows of a CSV table, in memory."""

    def __init__(self, file: Path, column: str):
        self.file = file
        try:
            self.rows = list(csv_rows(file))
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe: data.source: {error}") from error

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, place: int) -> str:
        return f"{self.file.name}:{self.rows[place][0]}"

    def fields(self, place: int) -> dict[str, Any]:
        return dict(self.rows[place][1])


class Parquet:
    """The rows of a parquet file. A row is read with its row group: tables whose groups hold thousands of pictures are
    read faster as shards, which `data filter` writes."""

    def __init__(self, file: Path, column: str):
        with needed_for(f"reading {file}"):
            import pyarrow as pa
            import pyarrow.parquet as pq

        self.file = file
        try:
            with pq.ParquetFile(file) as table:
                sizes = [table.metadata.row_group(k).num_rows for k in range(table.metadata.num_row_groups)]
        except (pa.ArrowInvalid, OSError) as error:
            raise RecipeError(f"recipe: data.source {file} cannot be read: {error}") from error
        self.ends = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def origin(self, place: int) -> str:
        return f"{self.file.name}:{place}"

    def fields(self, place: int) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        group = int(np.searchsorted(self.ends, place, side="right")) - 1
        try:
            with pq.ParquetFile(self.file) as table:
                rows = table.read_row_group(group).slice(place - int(self.ends[group]), 1)
            (fields,) = rows.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise Unreadable(f"row {place} cannot be read: {error}") from error
        return {name: value for name, value in fields.items() if value is not None}


_READERS: dict[str, Any] = {".jsonl": JsonLines, ".csv": Csv, ".parquet": Parquet}


class Table:
    """The rows of a table, pictures or edits.

    Args:
        file: of one of `SUFFIXES`.
        image_column: has the picture's path, relative to the table, or its bytes; see `data.collect.collect`.
        caption_column: has the caption, or of an edit the instruction; empty: `caption`, `captions` or `text`, of an
            edit also `instruction`, `edit_prompt` or `prompt`.
        reference_columns: have what an edit begins with, a path, bytes or a list of them; empty: the first of
            `references`, `reference`, `source_image`, `original_image`, `input_image`, `before`. A table that has none
            is one of pictures.
        references: of a table of edits, [least, most]: rows with so many of them alone; empty: all rows.

    A column `mask` has a picture that is white where the loss counts.

    Raises:
        RecipeError: the table cannot be read, has no rows, or lacks a column that is asked for.
        ImportError: pyarrow, for parquet, is not installed.
    """

    def __init__(
        self,
        file: Path,
        image_column: str = "",
        caption_column: str = "",
        reference_columns: Sequence[str] = (),
        references: Sequence[int] = (),
    ):
        self.caption_column, self.asked = caption_column, image_column
        self.rows: Rows = _READERS[file.suffix.lower()](file, image_column or "image")
        self.skipped: list[str] = []
        if not len(self.rows):
            raise RecipeError(f"recipe: data.source must have rows, got {file}, which has none")
        first = self._first()
        for name, columns in (
            ("image_column", [image_column]), ("caption_column", [caption_column]),
            ("reference_columns", reference_columns),
        ):  # fmt: skip
            for column in columns:
                if column and column not in first:
                    raise RecipeError(
                        f"recipe: data.options.{name} must be a column of {file}: {', '.join(first)}; got {column!r}"
                    )
        self.reference_columns = list(reference_columns) or [name for name in REFERENCES if name in first][:1]
        self.edits = bool(self.reference_columns)
        self.places = np.arange(len(self.rows))
        if references:
            self._choose(file, list(references))
        self.folders = [""] * len(self.places)

    def _first(self) -> Mapping[str, Any]:
        """The first row that can be read."""
        for place in range(min(len(self.rows), 1000)):
            try:
                return self.rows.fields(place)
            except Unreadable:
                pass
        return {}

    def _choose(self, file: Path, limits: list[int]) -> None:
        if not (self.edits and len(limits) == 2 and 1 <= limits[0] <= limits[1]):
            raise RecipeError(
                f"recipe: data.options.references must be [least, most] of a table of edits, got {limits}"
            )
        counts = np.array([len(self._references(place)) for place in self.places])
        self.places = np.flatnonzero((limits[0] <= counts) & (counts <= limits[1]))
        if not len(self.places):
            raise RecipeError(f"recipe: no row of {file} has {limits[0]} to {limits[1]} references")

    def _references(self, place: int) -> list[Any]:
        try:
            return self._listed(self.rows.fields(int(place)))
        except Unreadable:
            return []

    def _listed(self, fields: dict[str, Any]) -> list[Any]:
        """The references of a row, taken out of it."""
        listed = []
        for name in self.reference_columns:
            value = fields.pop(name, None)
            listed += value if isinstance(value, list) else [] if value is None else [value]
        return listed

    def paths(self) -> Iterator[Path]:
        """The files that its rows name."""
        for place in range(len(self.rows)):
            with contextlib.suppress(Unreadable):
                for value in self.rows.fields(place).values():
                    for entry in value if isinstance(value, list) else [value]:
                        if (path := path_of(self.rows.file, entry)) is not None:
                            yield path

    def __len__(self) -> int:
        return len(self.places)

    def read(self, place: int) -> Example:
        row = int(self.places[place])
        file, origin = self.rows.file, self.rows.origin(row)
        try:
            fields = self.rows.fields(row)
        except Unreadable as error:
            return Example(Record(b"", origin=origin, fault=str(error)))
        before, mask = self._listed(fields), fields.pop("mask", None)
        captions = [self.caption_column] if self.caption_column else list(INSTRUCTIONS if self.edits else ())
        if (caption := next((name for name in captions if name in fields), None)) is not None:
            for other in ("caption", "captions", "text") if caption == self.caption_column else ():
                if other != caption:
                    fields.pop(other, None)
            fields["caption"] = fields.pop(caption)
        asked = self.asked or next((name for name in EDITED if self.edits and name in fields), "image")
        column = image_column(fields, asked)
        given = [fields.get(column), *before, *([] if mask is None else [mask])]
        paths = [path_of(file, value) for value in given]
        missing = next((path for path in paths if path is not None and not path.is_file()), None)
        target = record_of_row(file, fields, column, origin, {})
        if self.edits and not (before or target.fault):
            target = dataclasses.replace(target, fault=f"the row has no {' or '.join(self.reference_columns)}")
        references = tuple(_picture(file, value, origin, f"reference {n}") for n, value in enumerate(before, 1))
        return Example(target, references, None if mask is None else _picture(file, mask, origin, "mask"), missing)


def _picture(file: Path, value: Any, origin: str, column: str) -> Record:
    image, fault = picture_of(file, value, column)
    return Record(image, origin=f"{origin}, {column}", fault=fault)


class Joined:
    """Several catalogues one after another, of one kind."""

    def __init__(self, parts: Sequence[Any], skipped: Sequence[str] = ()):
        self.parts = list(parts)
        self.ends = np.cumsum([0, *(len(part) for part in self.parts)])
        self.skipped = [*skipped, *(sentence for part in self.parts for sentence in part.skipped)]
        self.edits = self.parts[0].edits
        self.folders = [folder for part in self.parts for folder in part.folders]
        if any(part.edits != self.edits for part in self.parts):
            raise RecipeError("recipe: the tables of data.source must all be of pictures, or all of edits")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, place: int) -> Example:
        part = int(np.searchsorted(self.ends, place, side="right")) - 1
        return self.parts[part].read(place - int(self.ends[part]))
