"""Reading records from folders, WebDataset tar shards, parquet and JSON lines, one at a time.

What cannot be read does not stop the run: the record comes without a picture, or without captions, and says why in
`fault`. Only a source that is missing or has no records at all is an error.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_image_fast.extras import needed_for

from .record import Record, record_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LARGEST_FILE = 256 * 2**20
_TABLES = (".tar", ".tar.gz", ".tgz", ".parquet", ".jsonl")


def collect(
    path: str | Path, *, source: str = "", licence: str = "", category: str = "", image_column: str = "image"
) -> Iterator[Record]:
    """The records of a source, in a fixed order, with one of them in memory at a time.

    Args:
        path: a `.tar`, `.tar.gz`, `.tgz`, `.parquet` or `.jsonl` file, a folder that has such files, or a folder of
            pictures, read in depth, each with `<name>.txt` (the raw caption) and `<name>.json` (see `record_of`).
        source, licence, category: of records that do not say their own. Without a source, the path's name.
        image_column: of tables: the path of the picture, relative to the table; in parquet also its bytes, or the
            `{bytes, path}` of Hugging Face datasets. In JSON lines, `<image_column>_base64` holds bytes.

    Raises:
        FileNotFoundError: there is no such path, or nothing in it to read.
        PermissionError: the folder may not be read.
        ValueError: the file is of no known kind.
        ImportError: pyarrow, for parquet, is not installed.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"collect: there is no {path}: give a folder, or a file ending in {', '.join(_TABLES)}")
    defaults = {"source": source or root.name, "licence": licence, "category": category}
    if root.is_file():
        files = [root]
        if not _is_table(root):
            raise ValueError(f"collect: {path} must be a folder or end in {', '.join(_TABLES)}")
    else:
        files = sorted(entry for entry in root.iterdir() if entry.is_file() and _is_table(entry))
    records = _tables(files, image_column, defaults) if files else _folder(root, root, defaults)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        what = (
            f"pictures ({', '.join(IMAGE_SUFFIXES)}) or tables ({', '.join(_TABLES)})" if root.is_dir() else "records"
        )
        raise FileNotFoundError(f"collect: {path} has no {what}")


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(_TABLES) and not path.name.startswith(".")


def _tables(files: list[Path], column: str, defaults: Mapping[str, str]) -> Iterator[Record]:
    for file in files:
        name = file.name.lower()
        if name.endswith(".jsonl"):
            yield from _json_lines(file, column, defaults)
        elif name.endswith(".parquet"):
            # The index beside shards describes them; it has no pictures of its own.
            if file.name != "index.parquet" or len(files) == 1:
                yield from _parquet(file, column, defaults)
        else:
            yield from _shard(file, defaults)


def _folder(folder: Path, root: Path, defaults: Mapping[str, str]) -> Iterator[Record]:
    """In depth, in order of name; one folder's names are in memory, not the tree's."""
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in names:
        path = folder / name
        if is_folder:
            yield from _folder(path, root, defaults)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            origin = path.relative_to(root).as_posix()
            image, fault = read_picture(path)
            text, fault = _sidecar(path.with_suffix(".txt"), fault)
            fields, fault = _sidecar(path.with_suffix(".json"), fault)
            yield _assembled(image, text, fields, fault, origin, defaults)


def read_picture(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, and a sentence where they cannot be had."""
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            return b"", f"the file has {size} bytes, more than {LARGEST_FILE}"
        return path.read_bytes(), ""
    except OSError as error:
        return b"", f"the file cannot be read: {error.strerror or error}"


def _sidecar(path: Path, fault: str) -> tuple[bytes | None, str]:
    if not path.exists():
        return None, fault
    content, problem = read_picture(path)
    return content, fault or problem


def _assembled(
    image: bytes, text: bytes | None, fields: bytes | None, fault: str, origin: str, defaults: Mapping[str, str]
) -> Record:
    values: dict[str, Any] = {}
    try:
        if fields is not None:
            values = json.loads(fields)
            if not isinstance(values, dict):
                raise ValueError(f"its JSON must be an object, got {type(values).__name__}")
        if text is not None and "caption" not in values and "captions" not in values:
            values["caption"] = text.decode("utf-8").strip()
    except UnicodeDecodeError:
        fault, values = fault or "its caption is not UTF-8", {}
    except (ValueError, RecursionError) as error:
        fault, values = fault or f"its JSON cannot be read: {error}", {}
    record = record_of(image, values, origin, defaults)
    return dataclasses.replace(record, fault=fault) if fault else record


def _shard(file: Path, defaults: Mapping[str, str]) -> Iterator[Record]:
    """Samples of a tar: neighbours whose names are the same up to the first dot of the last part."""
    key, parts, fault = None, {}, ""  # of the sample under way
    try:
        with tarfile.open(file, "r|*") as tar:
            for member in tar:
                tar.members = []  # it would keep every header
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if (found := f"{folder}/{stem}" if folder else stem) != key:
                    if record := _sample(file, key, parts, fault, defaults):
                        yield record
                    key, parts, fault = found, {}, ""
                if member.size > LARGEST_FILE:
                    fault = f"{member.name} has {member.size} bytes, more than {LARGEST_FILE}"
                    continue
                content = tar.extractfile(member)
                parts["." + extension.lower()] = content.read() if content else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        # The sample under way is incomplete; those before it are whole.
        fault = f"the shard {file.name} is cut off or damaged here: {error}"
        yield Record(b"", **defaults, origin=f"{file.name}:{key or ''}", fault=fault)
        return
    if record := _sample(file, key, parts, fault, defaults):
        yield record


def _sample(
    file: Path, key: str | None, parts: Mapping[str, bytes], fault: str, defaults: Mapping[str, str]
) -> Record | None:
    image = next((content for suffix, content in parts.items() if suffix in IMAGE_SUFFIXES), None)
    if key is None or not (image is not None or fault or {".txt", ".json"} & parts.keys()):
        return None
    if image is None:
        fault = fault or "the sample has no picture"
    return _assembled(image or b"", parts.get(".txt"), parts.get(".json"), fault, f"{file.name}:{key}", defaults)


def _json_lines(file: Path, column: str, defaults: Mapping[str, str]) -> Iterator[Record]:
    with open(file, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LARGEST_FILE), b""), 1):
            if not line.strip():
                continue
            yield record_of_line(file, line, number, column, defaults)


def record_of_line(file: Path, line: bytes, number: int, column: str, defaults: Mapping[str, str]) -> Record:
    """The record of line `number` of a file of JSON lines; see `collect`."""
    origin = f"{file.name}:{number}"
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError(f"it must be an object, got {type(fields).__name__}")
        image = fields.pop(f"{column}_base64", None)
        image = image if image is None else base64.b64decode(image, validate=True)
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        return Record(b"", **defaults, origin=origin, fault=f"line {number} cannot be read: {error}")
    return record_of_row(file, fields, fields.pop(column, None) if image is None else image, column, origin, defaults)


def _parquet(file: Path, column: str, defaults: Mapping[str, str]) -> Iterator[Record]:
    with needed_for("reading parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    number = 0
    try:
        with pq.ParquetFile(file, pre_buffer=False) as table:
            # pre_buffer would read a whole row group of pictures at once.
            for batch in table.iter_batches(batch_size=8):
                for fields in batch.to_pylist():
                    origin = f"{file.name}:{number}"
                    yield record_of_row(file, fields, fields.pop(column, None), column, origin, defaults)
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        fault = f"{file.name} is damaged after row {number}: {error}"
        yield Record(b"", **defaults, origin=f"{file.name}:{number}", fault=fault)


def record_of_row(
    file: Path, fields: dict[str, Any], image: Any, column: str, origin: str, defaults: Mapping[str, str]
) -> Record:
    """The record of a table's row, its picture given as bytes, as a path beside the table, or as {bytes, path}."""
    fault = ""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        image, fault = read_picture(file.parent / image)
    elif not isinstance(image, bytes):
        image, fault = b"", f"the row has no path or bytes in {column}"
    record = record_of(image, fields, origin, defaults)
    return dataclasses.replace(record, fault=fault) if fault else record
