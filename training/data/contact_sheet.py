"""A contact sheet of rejected pictures, each above its reason."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qwen_image_fast.files import atomic_write

from .filters.picture import BrokenImage, Picture
from .record import Record

_CELL, _GAP, _COLUMNS = 176, 12, 6
_TEXT_SIZE, _TEXT_LINES = 11, 5


class RejectedSheet:
    """Collects small copies of rejected pictures, the first few of every filter, and writes them as one PNG.

    Args:
        most: pictures on the sheet; each filter that rejects anything gets an equal part, rounded up.
        filters: how many filters there are.
    """

    def __init__(self, most: int, filters: int, max_pixels: int):
        self._most, self._each = most, math.ceil(most / max(1, filters)) + 1
        self._max_pixels = max_pixels
        self._found: dict[str, list[tuple[bytes, str]]] = {}

    def add(self, record: Record, row: dict[str, Any]) -> None:
        """A rejected record and its row of the audit."""
        cells = self._found.setdefault(row["filter"], [])
        if len(cells) < self._each:
            cells.append((self._small(record), f"{row['filter']}: {row['reason']} ({row['origin']})"))

    def write(self, path: Path) -> bool:
        """Write the sheet, in order of the filters' names; False, and nothing written, where nothing was rejected."""
        cells = [cell for name in sorted(self._found) for cell in self._found[name]][: self._most]
        if not cells:
            return False
        columns = min(_COLUMNS, len(cells))
        pitch = _CELL + _TEXT_LINES * (_TEXT_SIZE + 3) + _GAP
        sheet = Image.new(
            "RGB", (columns * (_CELL + _GAP) + _GAP, math.ceil(len(cells) / columns) * pitch + _GAP), "#ddd"
        )
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_SIZE)
        for number, (small, text) in enumerate(cells):
            left, top = _GAP + number % columns * (_CELL + _GAP), _GAP + number // columns * pitch
            if small:
                with Image.open(io.BytesIO(small)) as image:
                    sheet.paste(image, (left, top))
            else:
                draw.rectangle((left, top, left + _CELL, top + _CELL), fill="#bbb")
                draw.text((left + 40, top + 80), "no picture", font=font, fill="black")
            for line_number, line in enumerate(_wrapped(text, font)):
                draw.text((left, top + _CELL + 3 + line_number * (_TEXT_SIZE + 3)), line, font=font, fill="black")
        atomic_write(path, lambda file: sheet.save(file, format="PNG"))
        return True

    def _small(self, record: Record) -> bytes:
        try:
            image = Image.fromarray(Picture(record, self._max_pixels).rgb)
        except BrokenImage:
            return b""
        image.thumbnail((_CELL, _CELL), Image.Resampling.BOX)
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()


def _wrapped(text: str, font: Any) -> list[str]:
    """Lines no wider than a cell, broken between any two characters where a word is too long."""
    lines = [""]
    for character in text:
        if font.getlength(lines[-1] + character) > _CELL:
            head, space, tail = lines[-1].rpartition(" ")
            lines[-1:] = [head, tail] if space else [lines[-1], ""]
        lines[-1] += character
    return lines[:_TEXT_LINES]
