"""Contact sheets: what a recipe makes, with its captions, in one picture; `qwen-image-fast data preview`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from qwen_image_fast.files import numbered, write_new

from .canvas import wrap
from .editing import make_edit
from .fonts import Face, coverage, find_fonts, load
from .generator import make, stream
from .recipe import STRATEGIES, SynthesisRecipe, tiny
from .sample import EditSample, Sample

_GAP = 12
_TEXT_SIZE = 12
_TEXT_LINES = 5
_PRESETS = ("tiny", "mixed", *STRATEGIES)


def contact_sheet(
    samples: Sequence[Sample | EditSample], faces: Sequence[Face], columns: int = 6, cell: int = 160
) -> Image.Image:
    """Pictures in rows, each above its caption; editing pairs as source and target, the mask's edge drawn in red.

    Args:
        samples: at least one.
        faces: fonts for the captions: the one with most of their characters is used.
        columns: samples per row.
        cell: width in pixels of one picture; smaller pictures are enlarged by a whole factor where one fits.
    """
    if not samples or columns < 1 or cell < 16:
        raise ValueError(
            f"preview: it must have samples, columns and cells of 16 pixels, got {len(samples)}, {columns}, {cell}"
        )
    pictures = [_pictures(sample, cell) for sample in samples]
    captions = [s.instruction if isinstance(s, EditSample) else s.caption for s in samples]
    used = {ord(character) for caption in captions for character in caption}
    face = max(faces, key=lambda face: len(used & coverage(face)))
    across = max(len(row) for row in pictures)
    width = across * cell + (across - 1) * (_GAP // 3)
    height = max(image.height for row in pictures for image in row)
    pitch_x, pitch_y = width + _GAP, height + _TEXT_LINES * (_TEXT_SIZE + 3) + _GAP
    columns = min(columns, len(samples))
    sheet = Image.new("RGB", (columns * pitch_x + _GAP, math.ceil(len(samples) / columns) * pitch_y + _GAP), "#dcdcdc")
    draw = ImageDraw.Draw(sheet)
    for number, (row, caption) in enumerate(zip(pictures, captions)):
        left, top = _GAP + number % columns * pitch_x, _GAP + number // columns * pitch_y
        for place, image in enumerate(row):
            sheet.paste(image, (left + place * (cell + _GAP // 3), top))
        below = top + max(image.height for image in row) + 3
        for line_number, line in enumerate(_caption_lines(caption, face, width)):
            position = (left, below + line_number * (_TEXT_SIZE + 3))
            draw.text(position, line, font=load(face, _TEXT_SIZE), fill="black")
    return sheet


def write_preview(
    recipe: SynthesisRecipe,
    path: str | Path,
    *,
    seed: int = 0,
    start: int = 0,
    count: int = 24,
    edits: bool = False,
    columns: int = 6,
    cell: int = 160,
) -> Path:
    """Write the contact sheet of samples `start` to `start + count - 1` as a PNG, complete or not at all.

    No file is replaced: where there is a `preview.png`, it is `preview-0001.png`, which is returned.
    """
    samples = list(stream(recipe, seed, start, count, make=make_edit if edits else make))
    sheet = contact_sheet(samples, find_fonts(recipe.fonts, system=recipe.system_fonts), columns, cell)
    return write_new(numbered(path), lambda file: sheet.save(file, format="PNG"))


def find_recipe(
    name: str, size: int | None, languages: tuple[str, ...], fonts: tuple[str, ...], photos: str | None
) -> SynthesisRecipe:
    """A preset by its name, with these choices, or a JSON file, which has its own."""
    if name.endswith(".json"):
        try:
            values = json.loads(Path(name).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"the recipe {name} is not JSON: {error}") from error
        return SynthesisRecipe.from_dict(values)
    if name not in _PRESETS:
        raise ValueError(f"recipe must be one of {', '.join(_PRESETS)} or a .json file, got {name}")
    if name == "tiny":
        return tiny(size or 64, languages, fonts=fonts)
    chosen = [one for one in STRATEGIES if one != "scenes"] if name == "mixed" else [name]
    weights: dict[str, Any] = {strategy: float(strategy in chosen) for strategy in STRATEGIES}
    return SynthesisRecipe(**weights, sizes=((size or 256,) * 2,), languages=languages, fonts=fonts, photos=photos)


def _pictures(sample: Sample | EditSample, cell: int) -> list[Image.Image]:
    if isinstance(sample, Sample):
        return [_resized(sample.image, cell)]
    target = np.array(_resized(sample.target, cell))
    mask = np.asarray(Image.fromarray(sample.mask).resize(target.shape[1::-1], Image.Resampling.NEAREST))
    target[_edge(mask)] = (255, 0, 0)
    return [_resized(sample.source, cell), Image.fromarray(target)]


def _edge(mask: np.ndarray) -> np.ndarray:
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return mask & ~inner


def _resized(pixels: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(pixels)
    if image.width <= cell:
        factor = cell // image.width
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((cell, max(1, round(image.height * cell / image.width))), Image.Resampling.LANCZOS)


def _caption_lines(caption: str, face: Face, width: int) -> list[str]:
    covered = coverage(face)
    shown = "".join(c if ord(c) in covered or c == " " else "?" for c in caption)
    lines = wrap(shown, face, _TEXT_SIZE, width) or _cut(shown, face, width)
    if len(lines) > _TEXT_LINES:
        return [*lines[: _TEXT_LINES - 1], lines[_TEXT_LINES - 1][:-1] + "..."]
    return list(lines)


def _cut(text: str, face: Face, width: int) -> list[str]:
    """Lines broken between any two characters, for captions with words wider than the cell."""
    font, lines = load(face, _TEXT_SIZE), [""]
    for character in text:
        if lines[-1] and font.getlength(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return lines
