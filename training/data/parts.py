"""The sources of a recipe in parts that any process can read by itself: what resuming, workers and progress count in.

The parts of a run are planned once, before anything is judged, and written as JSON lines, so that neither their number
nor the number of pictures is in memory. Planning reads no picture: names in folders, headers of tars, ends of lines.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_image_fast.extras import needed_for

from .collect import (
    LARGEST_FILE,
    counts_as_sample,
    csv_rows,
    nothing_in,
    pictures_of,
    read_table,
    record_of_picture,
    sample_of,
    tables_of,
)
from .recipe import SourceRecipe
from .record import Record

RECORDS = 128
# What can only be read from its beginning is cut less often.
_CSV_ROWS, _PARQUET_ROWS = 4096, 1024


@dataclass(frozen=True)
class Part:
    """Neighbouring records of a source.

    Attributes:
        source: its number in the recipe.
        count: records, as planned; a damaged file may have fewer.
        pictures: of a folder, their names.
        file, first, offset: of a table, see `collect.read_table`.
    """

    source: int
    count: int
    pictures: tuple[str, ...] = ()
    file: str = ""
    first: int = 0
    offset: int = 0


def plan(sources: Sequence[SourceRecipe]) -> Iterator[Part]:
    """The parts of all sources in their order: the records of `collect.collect`, whose errors these are."""
    for number, source in enumerate(sources):
        root, files = tables_of(source.path)
        empty = True
        for part in _of_files(number, files) if files else _of_folder(number, root):
            empty = False
            yield part
        if empty:
            raise nothing_in(root)


def read_part(part: Part, source: SourceRecipe) -> Iterator[Record]:
    """The records of a part, one at a time."""
    path = Path(source.path).expanduser()
    defaults = {"source": source.source or path.name, "licence": source.licence, "category": source.category}
    if not part.file:
        return (record_of_picture(path / name, name, defaults) for name in part.pictures)
    records = read_table(Path(part.file), source.image_column, defaults, part.first, part.offset)
    return itertools.islice(records, part.count)


def same(record: Record | None, row: Mapping[str, Any], command: str) -> Record:
    """The record that `row` is of, read again; ValueError where the source has changed since."""
    if record is None or record.origin != row["origin"] or (row["kept"] and record.id != row["id"]):
        raise ValueError(
            f"{command}: {row['origin']} of {row['source']} is not what it was when it was judged: leave the sources "
            "alone while a run goes on; remove its --out and begin again"
        )
    return record


def text_of(part: Part) -> str:
    """A line of JSON, which `part_of` reads."""
    return json.dumps(dataclasses.asdict(part))


def part_of(line: str) -> Part:
    fields = json.loads(line)
    return Part(**{**fields, "pictures": tuple(fields["pictures"])})


def write_plan(parts: Iterable[Part], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for part in parts:
            file.write(text_of(part) + "\n")


def read_plan(path: Path) -> Iterator[Part]:
    with open(path, encoding="utf-8") as file:
        yield from map(part_of, file)


def _of_folder(source: int, root: Path) -> Iterator[Part]:
    names = pictures_of(root)
    while some := tuple(itertools.islice(names, RECORDS)):
        yield Part(source, len(some), some)


def _of_files(source: int, files: Sequence[Path]) -> Iterator[Part]:
    for file in files:
        yield from _of_table(source, file)


def _of_table(source: int, file: Path) -> Iterator[Part]:
    name, path = file.name.lower(), str(file.absolute())
    if name.endswith(".jsonl"):
        for count, before, offset in _lines(file):
            yield Part(source, count, (), path, before, offset)
    elif name.endswith((".csv", ".parquet")):
        rows, most = _csv_rows(file) if name.endswith(".csv") else _parquet_rows(file)
        for first in range(0, rows, most):
            yield Part(source, min(most, rows - first), (), path, first)
    else:
        for count, offset in _samples(file):
            yield Part(source, count, (), path, 0, offset)


def _lines(file: Path) -> Iterator[tuple[int, int, int]]:
    """(lines that are not empty, lines before them, offset) of each part of a file of JSON lines."""
    with open(file, "rb") as lines:
        count = before = offset = number = place = 0
        for line in iter(lambda: lines.readline(LARGEST_FILE), b""):
            number, place = number + 1, place + len(line)
            count += bool(line.strip())
            if count == RECORDS:
                yield count, before, offset
                count, before, offset = 0, number, place
        if count:
            yield count, before, offset


def _csv_rows(file: Path) -> tuple[int, int]:
    rows = 0
    try:
        for _ in csv_rows(file):
            rows += 1
    except (ValueError, OSError):
        rows += 1  # the record that says what is wrong
    return rows, _CSV_ROWS


def _parquet_rows(file: Path) -> tuple[int, int]:
    with needed_for("reading parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        return pq.read_metadata(file).num_rows, _PARQUET_ROWS
    except (pa.ArrowInvalid, OSError):
        return 1, 1  # the record that says what is wrong


def _samples(file: Path) -> Iterator[tuple[int, int]]:
    """(samples, offset of the first header) of each part of a tar; of a compressed one, all are one part."""
    try:
        with tarfile.open(file, "r:"):
            whole = False
    except (tarfile.TarError, OSError, EOFError):
        whole = True
    count = start = 0
    for offset in _starts(file):
        if count == RECORDS and not whole:
            yield count, start
            count = 0
        start = start if count else offset
        count += 1
    if count:
        yield count, 0 if whole else start


def _starts(file: Path) -> Iterator[int]:
    """The place of the first header of each sample of a tar that makes a record, and of what is damaged."""
    key, there, start = None, False, 0
    try:
        with tarfile.open(file, "r:*") as tar:
            for member in tar:
                tar.members = []  # it would keep every header
                if not member.isfile():
                    continue
                found, extension = sample_of(member)
                if found != key:
                    if there:
                        yield start
                    key, there, start = found, False, member.offset
                there = there or counts_as_sample(extension, member.size)
    except (tarfile.TarError, OSError, EOFError):
        there = True  # `collect` has one record for all that follows
    if there:
        yield start
