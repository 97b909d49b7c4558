"""Small copies of pictures on both sides of every threshold, collected while the filters run."""

from __future__ import annotations

import heapq
import io
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write

from .filters.picture import BrokenImage, Picture
from .record import Record

with needed_for("filtering a data set"):
    import pyarrow as pa
    import pyarrow.parquet as pq

SIDE = 160
SCHEMA = pa.schema(
    [
        ("filter", pa.string()), ("passes", pa.bool_()), ("score", pa.float64()), ("origin", pa.string()),
        ("reason", pa.string()), ("picture", pa.binary()),
    ]
)  # fmt: skip


def thumbnail(record: Record, max_pixels: int, side: int = SIDE) -> bytes:
    """A JPEG of at most side x side pixels; empty where the picture cannot be decoded."""
    try:
        image = Image.fromarray(Picture(record, max_pixels).rgb)
    except BrokenImage:
        return b""
    image.thumbnail((side, side), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


class Examples:
    """Of each filter, the few pictures nearest to its limit on each side.

    Args:
        limits: (low, high) by the filter's name; None: no limit. Filters without any show what they rejected first.
        each: pictures on a side.
        max_pixels: larger ones are not decoded.
    """

    def __init__(self, limits: dict[str, tuple[float | None, float | None]], each: int, max_pixels: int):
        self._limits, self._each, self._max_pixels = limits, each, max_pixels
        self._found: dict[tuple[str, bool], list[tuple[float, int, dict[str, Any]]]] = {}
        self._count = 0

    def add(self, record: Record, row: dict[str, Any]) -> None:
        """A record and its row of the audit."""
        self._count += 1
        made: bytes | None = None
        for name, (low, high) in self._limits.items():
            score, gone = row.get(name), row.get("filter") == name
            if score is None and not gone:
                continue
            sides = [abs(score - limit) for limit in (low, high) if limit is not None] if score is not None else []
            if not sides and not gone:
                continue
            distance = min(sides, default=float(self._count))
            heap = self._found.setdefault((name, not gone), [])
            if len(heap) == self._each and -heap[0][0] <= distance:
                continue
            made = thumbnail(record, self._max_pixels) if made is None else made
            entry = {
                "filter": name, "passes": not gone, "score": score, "origin": row["origin"],
                "reason": row.get("reason") if gone else None, "picture": made,
            }  # fmt: skip
            # The smallest of the heap is the farthest; the number decides between equals, before the dictionaries.
            (heapq.heappush if len(heap) < self._each else heapq.heapreplace)(heap, (-distance, -self._count, entry))

    def write(self, path: Path) -> None:
        rows = [entry for heap in self._found.values() for _, _, entry in sorted(heap, key=lambda one: one[:2])]
        atomic_write(path, lambda file: pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file))
