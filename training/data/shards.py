"""Writing records as WebDataset tar shards with a parquet index."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write

from .record import Record

with needed_for("writing shards"):
    import pyarrow as pa
    import pyarrow.parquet as pq

_INDEX_ROWS = 4096
_INDEX = pa.schema(
    [
        ("id", pa.string()), ("shard", pa.string()), ("key", pa.string()), ("caption", pa.string()),
        ("source", pa.string()), ("licence", pa.string()), ("category", pa.string()), ("metadata", pa.string()),
        ("bytes", pa.int64()), ("origin", pa.string()), ("offset", pa.int64()),
    ]
)  # fmt: skip
_SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"),
               (b"MM\0*", "tif"))  # fmt: skip


def write_shards(
    records: Iterable[Record], folder: str | Path, *, shard_records: int = 1000, shard_bytes: int = 256 * 2**20
) -> int:
    """Write `shard-00000.tar`, ... and then `index.parquet`, which only appears when all of them are complete.

    The index has a row for each: what the JSON says, its shard, and the offset of its first header there. A sample is
    `<key>.<type>` (the picture's bytes as they came), `<key>.json` (`Record.described`) and `<key>.txt`
    (the best caption). The bytes depend on the records alone, not on the time. One picture is in memory at a time.

    Args:
        records: consumed once.
        folder: made where it is missing; its earlier shards and index are removed.
        shard_records, shard_bytes: a shard ends when it has so many records, or at least so many bytes of pictures.

    Returns:
        The number of records.

    Raises:
        OSError: the disk is full, in a sentence; finished shards stay, the index does not appear.
    """
    if shard_records < 1 or shard_bytes < 1:
        raise ValueError(
            f"write_shards: a shard must hold 1 record and byte or more, got {shard_records}, {shard_bytes}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "index.parquet", *folder.glob("shard-*.tar")]:
        stale.unlink(missing_ok=True)
    stream, count = iter(records), 0

    def write_all(index: BinaryIO) -> None:
        nonlocal count
        with pq.ParquetWriter(index, _INDEX) as table:
            rows: list[dict[str, object]] = []
            for number in itertools.count():
                first = next(stream, None)
                if first is None:
                    break
                shard = folder / f"shard-{number:05d}.tar"
                chained = itertools.chain([first], stream)

                def fill(file: BinaryIO, shard: Path = shard, chained: Iterator[Record] = chained) -> None:
                    nonlocal count
                    for row in _fill(file, shard.name, chained, count, shard_records, shard_bytes):
                        rows.append(row)
                        count += 1
                        if len(rows) == _INDEX_ROWS:
                            table.write_table(pa.Table.from_pylist(rows, _INDEX))
                            rows.clear()

                atomic_write(shard, fill)
            table.write_table(pa.Table.from_pylist(rows, _INDEX))

    atomic_write(folder / "index.parquet", write_all)
    return count


def _fill(
    file: BinaryIO, shard: str, records: Iterator[Record], start: int, most: int, most_bytes: int
) -> Iterator[dict[str, object]]:
    size = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(start, start + most):
            record = next(records, None)
            if record is None:
                return
            key, described, offset = f"{number:09d}", record.described(), tar.offset
            _add(tar, f"{key}.{suffix(record.image)}", record.image)
            _add(tar, f"{key}.json", json.dumps(described, ensure_ascii=False, sort_keys=True).encode())
            _add(tar, f"{key}.txt", record.caption.encode())
            tar.members = []  # it would keep every header
            size += len(record.image)
            yield {
                "id": record.id, "shard": shard, "key": key, "caption": record.caption, "source": record.source,
                "licence": record.licence, "category": record.category, "bytes": len(record.image),
                "metadata": json.dumps(described["metadata"], ensure_ascii=False, sort_keys=True),
                "origin": record.origin, "offset": offset,
            }  # fmt: skip
            if size >= most_bytes:
                return


def suffix(image: bytes) -> str:
    """The usual ending of a file of these bytes, by their signature: jpg, png, gif, bmp, tif or webp."""
    return next((name for start, name in _SIGNATURES if image.startswith(start)), "webp")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
