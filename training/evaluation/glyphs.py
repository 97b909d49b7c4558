"""What a text says, by pixels alone, where its font and its place are known: every letter against all others.

No reader is needed, and none guesses words: each letter is the one of the alphabet that is nearest at its place.
"""

from __future__ import annotations

import functools
import string

import numpy as np
from PIL import Image, ImageDraw

from qwen_image_fast.training.evaluation.colour_metrics import Box
from qwen_image_fast.training.synthesis.canvas import draw_line, text_mask
from qwen_image_fast.training.synthesis.fonts import Face, load

ALPHABET = string.ascii_letters + string.digits
_SHIFT = 6  # pixels that a whole text may be away from its place
_NEAR = 0.4  # of a letter's ink: the largest squared difference at which it is still a letter
_NOTHING = "?"
_SIZES = range(6, 65)  # of the font, in pixels


def read_at(image: np.ndarray, rendered: np.ndarray, box: Box, text: str, face: Face) -> str:
    """What is written where `text` should be: at every letter the nearest of `ALPHABET`, `?` where none is near.

    Args:
        image: uint8 [H, W, 3] on a plain ground. rendered: a picture of the same size that has the text.
        box: of the ink of the text in `rendered`, in one line, drawn with the face.

    Raises:
        ValueError: the box is of no size of the font, or the text has other characters.
    """
    if strange := set(text) - set(ALPHABET):
        raise ValueError(f"read_at: text must be of letters and digits, got {''.join(sorted(strange))!r}")
    size = font_size(rendered, box, text, face)
    ink, wanted = _ink(image, box), np.zeros(image.shape[:2])
    left, top, right, bottom = box
    wanted[top:bottom, left:right] = np.asarray(text_mask((text,), face, size, 1.2, "center")) / 255
    reach = range(-_SHIFT, _SHIFT + 1)
    padded = np.pad(ink, _SHIFT)
    height, width = ink.shape

    def overlap(shift: tuple[int, int]) -> float:
        dy, dx = _SHIFT + shift[0], _SHIFT + shift[1]
        return float((padded[dy : dy + height, dx : dx + width] * wanted).sum())

    # Of places that are as good the one nearest to where it should be.
    down, along = max(((dy, dx) for dy in reach for dx in reach), key=lambda s: (overlap(s), -abs(s[0]) - abs(s[1])))
    font = load(face, size)
    before, above = _bearing(text, face, size)
    read = ""
    for i, letter in enumerate(text):
        origin = font.getlength(text[: i + 1]) - font.getlength(letter)
        read += _letter(ink, letter, face, size, left + along + round(origin - before), top + down - above)
    return read


def _bearing(text: str, face: Face, size: int) -> tuple[int, int]:
    """Where the ink of a line begins, in pixels to the right of its origin and below its baseline."""
    cell = Image.new("L", (round(load(face, size).getlength(text)) + 2 * size, 3 * size))
    draw_line(ImageDraw.Draw(cell), (size, 2 * size), text, load(face, size), 255)
    box = cell.getbbox()
    return (box[0] - size, box[1] - 2 * size) if box else (0, 0)


def font_size(rendered: np.ndarray, box: Box, text: str, face: Face) -> int:
    """The size in pixels of a line whose ink in a picture fills a box."""
    left, top, right, bottom = box
    ink = _ink(rendered, box)[top:bottom, left:right]
    masks = {size: text_mask((text,), face, size, 1.2, "center") for size in _SIZES}
    # Two sizes may have ink of the same extent.
    fitting = {s: np.asarray(m) / 255 for s, m in masks.items() if m.size == (right - left, bottom - top)}
    if not fitting:
        raise ValueError(f"read_at: box must be the ink of {text!r} in one line, got {box}")
    return min(fitting, key=lambda s: float(((fitting[s] - ink) ** 2).sum()))


def _letter(ink: np.ndarray, wanted: str, face: Face, size: int, x: int, baseline: int) -> str:
    """The letter at an origin, in a cell as wide as the wanted one, a pixel of shift allowed."""
    glyphs = _glyphs(face, size, wanted)
    height, width = glyphs.shape[1:]
    padded = np.pad(ink, size)
    distance = np.full(len(ALPHABET), np.inf)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            top, left = baseline + dy, x + dx + size
            cell = padded[max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
            if cell.shape == (height, width):
                distance = np.minimum(distance, ((glyphs - cell) ** 2).sum((1, 2)))
    best = int(distance.argmin())
    return ALPHABET[best] if distance[best] <= _NEAR * (glyphs[best] ** 2).sum() else _NOTHING


@functools.lru_cache(maxsize=512)
def _glyphs(face: Face, size: int, wanted: str) -> np.ndarray:
    """float [letters, height, width]: all of the alphabet in the cell of a letter, those of another width centred."""
    font = load(face, size)
    width, height = max(2, round(font.getlength(wanted))), round(1.3 * size)
    made = []
    for letter in ALPHABET:
        cell = Image.new("L", (width, height))
        start = (font.getlength(wanted) - font.getlength(letter)) / 2
        draw_line(ImageDraw.Draw(cell), (start, size), letter, font, 255)
        made.append(np.asarray(cell) / 255)
    return np.stack(made)


def _ink(image: np.ndarray, box: Box) -> np.ndarray:
    """float [H, W], 0 to 1: how far a pixel is on the way from the ground to what stands out most in the box."""
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    away = image.astype(np.float64) - np.median(edge, axis=0)
    left, top, right, bottom = box
    inside = away[max(0, top) : bottom, max(0, left) : right].reshape(-1, 3)
    distance = np.linalg.norm(inside, axis=1)
    farthest = float(np.quantile(distance, 0.98)) if len(inside) else 0.0
    if farthest < 40:
        return np.zeros(image.shape[:2])
    colour = np.median(inside[distance >= 0.7 * farthest], axis=0)
    return np.clip(away @ colour / (colour @ colour), 0.0, 1.0)
