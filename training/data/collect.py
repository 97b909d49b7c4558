"""Reading records from folders, WebDataset tar shards, parquet, JSON lines and CSV, one at a time.

What cannot be read does not stop the run: the record comes without a picture, or without captions, and says why in
`fault`. Only a source that is missing or has no records at all is an error.
"""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.text_files import beside, decoded

from .record import Record, record_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LARGEST_FILE = 256 * 2**20
CAPTION_SUFFIXES = (".txt", ".caption")
# Where a table has its pictures, if not in the column that is asked for: those of Hugging Face's image folders first.
IMAGE_COLUMNS = ("image", "file_name", "image_path", "path", "file")
_TABLES = (".tar", ".tar.gz", ".tgz", ".parquet", ".jsonl", ".csv")


def collect(
    path: str | Path, *, source: str = "", licence: str = "", category: str = "", image_column: str = "image"
) -> Iterator[Record]:
    """The records of a source, in a fixed order, with one of them in memory at a time.

    Args:
        path: a `.tar`, `.tar.gz`, `.tgz`, `.parquet`, `.jsonl` or `.csv` file, a folder that has such files, or a
            folder of pictures, read in depth, each with `<name>.txt` or `<name>.caption` (the raw caption) and
            `<name>.json` (see `record_of`). What is hidden is not read.
        source, licence, category: of records that do not say their own. Without a source, the path's name.
        image_column: of tables: the path of the picture, relative to the table; in parquet also its bytes, or the
            `{bytes, path}` of Hugging Face datasets. In JSON lines, `<image_column>_base64` holds bytes. A table
            without it has them in `file_name`, `image_path`, `path` or `file`.

    Raises:
        FileNotFoundError: there is no such path, or nothing in it to read.
        PermissionError: the folder may not be read.
        ValueError: the file is of no known kind.
        ImportError: pyarrow, for parquet, is not installed.
    """
    root, files = tables_of(path)
    defaults = {"source": source or root.name, "licence": licence, "category": category}
    if files:
        records = itertools.chain.from_iterable(read_table(file, image_column, defaults) for file in files)
    else:
        records = (record_of_picture(root / name, name, defaults) for name in pictures_of(root))
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise nothing_in(root)


def tables_of(path: str | Path) -> tuple[Path, list[Path]]:
    """A source's path, and its tables in order; none: it is a folder of pictures. Errors as of `collect`."""
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"collect: there is no {path}: give a folder, or a file ending in {', '.join(_TABLES)}")
    if root.is_file():
        if not _is_table(root):
            raise ValueError(f"collect: {path} must be a folder or end in {', '.join(_TABLES)}")
        return root, [root]
    files = sorted(entry for entry in root.iterdir() if entry.is_file() and _is_table(entry))
    # The index beside shards describes them; it has no pictures of its own.
    return root, [file for file in files if file.name.lower() != "index.parquet" or len(files) == 1]


def nothing_in(root: Path) -> FileNotFoundError:
    what = f"pictures ({', '.join(IMAGE_SUFFIXES)}) or tables ({', '.join(_TABLES)})" if root.is_dir() else "records"
    return FileNotFoundError(f"collect: {root} has no {what}")


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(_TABLES) and not path.name.startswith(".")


def read_table(
    file: Path, column: str, defaults: Mapping[str, str], first: int = 0, offset: int = 0
) -> Iterator[Record]:
    """The records of one table, or those from a place that `parts.plan` has noted.

    Args:
        first: of parquet and CSV, the rows to leave out; of JSON lines, the lines before `offset`.
        offset: of JSON lines and uncompressed tars, the byte to begin at.
    """
    name = file.name.lower()
    if name.endswith(".jsonl"):
        return _json_lines(file, column, defaults, first, offset)
    if name.endswith(".csv"):
        return itertools.islice(_csv(file, column, defaults), first, None)
    if name.endswith(".parquet"):
        return _parquet(file, column, defaults, first)
    return _shard(file, defaults, offset)


def pictures_of(root: Path, inside: str = "") -> Iterator[str]:
    """Names of pictures, relative to `root`, in depth and in order; one folder's are in memory, not the tree's."""
    with os.scandir(root / inside) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in names:
        path = f"{inside}/{name}" if inside else name
        if name.startswith("."):
            continue
        if is_folder:
            yield from pictures_of(root, path)
        elif Path(name).suffix.lower() in IMAGE_SUFFIXES:
            yield path


def record_of_picture(path: Path, origin: str, defaults: Mapping[str, str]) -> Record:
    """A picture of a folder, with the captions and fields that stand beside it."""
    image, fault = read_picture(path)
    text, fault = _sidecar(beside(path, *CAPTION_SUFFIXES), fault)
    fields, fault = _sidecar(beside(path, ".json"), fault)
    return _assembled(image, text, fields, fault, origin, defaults)


def read_picture(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, and a sentence where they cannot be had."""
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            return b"", f"the file has {size} bytes, more than {LARGEST_FILE}"
        return path.read_bytes(), ""
    except OSError as error:
        return b"", f"the file cannot be read: {error.strerror or error}"


def _sidecar(path: Path | None, fault: str) -> tuple[bytes | None, str]:
    if path is None:
        return None, fault
    content, problem = read_picture(path)
    return content, fault or problem


def _assembled(
    image: bytes, text: bytes | None, fields: bytes | None, fault: str, origin: str, defaults: Mapping[str, str]
) -> Record:
    values: dict[str, Any] = {}
    try:
        if fields is not None:
            values = json.loads(decoded(fields))
            if not isinstance(values, dict):
                raise ValueError(f"it must be an object, got {type(values).__name__}")
    except (ValueError, RecursionError) as error:
        fault, values = fault or f"its JSON cannot be read: {error}", {}
    try:
        if text is not None and not ({"caption", "captions", "text"} & values.keys()):
            values["caption"] = decoded(text)
    except ValueError as error:
        fault, values = fault or f"its caption {error}", {}
    record = record_of(image, values, origin, defaults)
    return dataclasses.replace(record, fault=fault) if fault else record


def _shard(file: Path, defaults: Mapping[str, str], offset: int) -> Iterator[Record]:
    """Samples of a tar: neighbours whose names are the same up to the first dot of the last part."""
    key, parts, fault = None, {}, ""  # of the sample under way
    try:
        with open(file, "rb") as content, tarfile.open(fileobj=at(content, offset), mode="r|*") as tar:
            for member in tar:
                tar.members = []  # it would keep every header
                if not member.isfile():
                    continue
                found, extension = sample_of(member)
                if found != key:
                    if record := _sample(file, key, parts, fault, defaults):
                        yield record
                    key, parts, fault = found, {}, ""
                if member.size > LARGEST_FILE:
                    fault = f"{member.name} has {member.size} bytes, more than {LARGEST_FILE}"
                    continue
                inside = tar.extractfile(member)
                parts[extension] = inside.read() if inside else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        # The sample under way is incomplete; those before it are whole.
        fault = f"the shard {file.name} is cut off or damaged here: {error}"
        yield Record(b"", **defaults, origin=f"{file.name}:{key or ''}", fault=fault)
        return
    if record := _sample(file, key, parts, fault, defaults):
        yield record


def at(file: BinaryIO, offset: int) -> BinaryIO:
    file.seek(offset)
    return file


def sample_of(member: tarfile.TarInfo) -> tuple[str, str]:
    """The key of the sample that a file belongs to, and what follows it, in small letters: (`a/00012`, `.jpg`)."""
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, "." + extension.lower()


def counts_as_sample(extension: str, size: int) -> bool:
    """Whether a file makes a record of the sample it is in: a picture, its words, or what is too large to read."""
    return extension in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, ".json") or size > LARGEST_FILE


def _sample(
    file: Path, key: str | None, parts: Mapping[str, bytes], fault: str, defaults: Mapping[str, str]
) -> Record | None:
    if key is None or not (fault or any(counts_as_sample(extension, 0) for extension in parts)):
        return None
    return record_of_parts(parts, fault, f"{file.name}:{key}", defaults)


def record_of_parts(parts: Mapping[str, bytes], fault: str, origin: str, defaults: Mapping[str, str]) -> Record:
    """The record of a WebDataset sample: its files by what follows their common name."""
    image = next((content for suffix, content in parts.items() if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        fault = fault or "the sample has no picture"
    text = next((parts[suffix] for suffix in CAPTION_SUFFIXES if suffix in parts), None)
    return _assembled(image or b"", text, parts.get(".json"), fault, origin, defaults)


def _json_lines(file: Path, column: str, defaults: Mapping[str, str], before: int, offset: int) -> Iterator[Record]:
    with open(file, "rb") as lines:
        lines.seek(offset)
        for number, line in enumerate(iter(lambda: lines.readline(LARGEST_FILE), b""), before + 1):
            if not line.strip():
                continue
            yield record_of_line(file, line, number, column, defaults)


def record_of_line(file: Path, line: bytes, number: int, column: str, defaults: Mapping[str, str]) -> Record:
    """The record of line `number` of a file of JSON lines; see `collect`."""
    origin = f"{file.name}:{number}"
    try:
        return record_of_row(file, fields_of_line(line, column), column, origin, defaults)
    except ValueError as error:
        return Record(b"", **defaults, origin=origin, fault=f"line {number} cannot be read: {error}")


def fields_of_line(line: bytes, column: str) -> dict[str, Any]:
    """The object of a line of JSON, with the bytes of `<column>_base64` in `column`; ValueError where it is none."""
    try:
        fields = json.loads(decoded(line))
        if not isinstance(fields, dict):
            raise ValueError(f"it must be an object, got {type(fields).__name__}")
        if (content := fields.pop(f"{column}_base64", None)) is not None:
            fields[column] = base64.b64decode(content, validate=True)
        return fields
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise ValueError(str(error)) from error


def _csv(file: Path, column: str, defaults: Mapping[str, str]) -> Iterator[Record]:
    try:
        for number, fields in csv_rows(file):
            yield record_of_row(file, fields, column, f"{file.name}:{number}", defaults)
    except (ValueError, OSError) as error:
        yield Record(b"", **defaults, origin=file.name, fault=str(error))


def csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and fields of each row of a CSV table whose first row names the columns.

    Raises:
        ValueError: it is no such table, in a sentence. OSError: it cannot be read.
    """
    try:
        rows = csv.DictReader(io.StringIO(decoded(file.read_bytes())), strict=True)
        for number, fields in enumerate(rows, 1):
            if None in fields:
                raise ValueError(f"row {number} has more fields than the first row has names")
            yield number, {name: value for name, value in fields.items() if value not in (None, "")}
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file} is no CSV table: {error}") from error


def _parquet(file: Path, column: str, defaults: Mapping[str, str], first: int) -> Iterator[Record]:
    with needed_for("reading parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    number = 0
    try:
        with pq.ParquetFile(file, pre_buffer=False) as table:
            # pre_buffer would read a whole row group of pictures at once.
            groups = list(range(table.num_row_groups))
            while groups and number + (rows := table.metadata.row_group(groups[0]).num_rows) <= first:
                number += rows
                groups.pop(0)
            for batch in table.iter_batches(batch_size=8, row_groups=groups):
                for fields in batch.to_pylist():
                    if number >= first:
                        yield record_of_row(file, fields, column, f"{file.name}:{number}", defaults)
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        fault = f"{file.name} is damaged after row {number}: {error}"
        yield Record(b"", **defaults, origin=f"{file.name}:{number}", fault=fault)


def record_of_row(file: Path, fields: dict[str, Any], column: str, origin: str, defaults: Mapping[str, str]) -> Record:
    """The record of a table's row, its picture given as bytes, as a path beside the table, or as {bytes, path}."""
    column = image_column(fields, column)
    image, fault = picture_of(file, fields.pop(column, None), column)
    record = record_of(image, fields, origin, defaults)
    return dataclasses.replace(record, fault=fault) if fault else record


def image_column(fields: Mapping[str, Any], asked: str) -> str:
    """The column that has the picture: the one asked for, or where the row lacks it, the first of `IMAGE_COLUMNS`."""
    return asked if asked in fields else next((name for name in IMAGE_COLUMNS if name in fields), asked)


def path_of(file: Path, value: Any) -> Path | None:
    """The file that a table's field names; None: it holds the bytes, or nothing."""
    if isinstance(value, Mapping):
        value = None if value.get("bytes") else value.get("path")
    return file.parent / value if isinstance(value, str) else None


def picture_of(file: Path, value: Any, column: str) -> tuple[bytes, str]:
    """The bytes of a picture that a table's field names or holds, and a sentence where there are none."""
    if (path := path_of(file, value)) is not None:
        return read_picture(path)
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return (value, "") if isinstance(value, bytes) else (b"", f"the row has no path or bytes in {column}")
