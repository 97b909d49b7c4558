"""Stage 4, text rendering: splits by the language of the text in the picture, and what is too dense or small to learn.

The reader runs once per picture, for all three filters.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...evaluation.ocr import Line
from .base import Filter, Measure, Verdict
from .captions import has_han
from .picture import Picture

_LEAST_CONFIDENCE = 0.6


class TextReader(Protocol):
    """Reads lines of text in a uint8 image of [height, width, 3]; `evaluation.ocr.Reader` is one."""

    def read(self, image: np.ndarray) -> list[Line]: ...


class LanguageSplit(Filter):
    """Tags a record with the language of the text in its picture: `English`, `Chinese`, `Other` or `Non-text`.

    Chinese where a line has Han characters, English where all letters are ASCII. Never rejects. Score: letters.
    The tag is `text_language` in the metadata; `Picture.lines` is where the later filters find the lines.

    Args:
        reader: of the text.
    """

    name, stage = "language_split", 4

    def __init__(self, reader: TextReader):
        self._reader = reader

    def judge(self, picture: Picture) -> Verdict:
        found = self._reader.read(np.ascontiguousarray(picture.work))
        picture.lines = [line for line in found if line.score >= _LEAST_CONFIDENCE and line.text]
        text = "".join(line.text for line in picture.lines)
        letters = [c for c in text if c.isalpha()]
        if not letters:
            language = "Non-text"
        elif has_han(text):
            language = "Chinese"
        else:
            language = "English" if all(c.isascii() for c in letters) else "Other"
        picture.tags["text_language"] = language
        return Verdict(float(len(letters)))


class IntensiveText(Measure):
    """Share of the picture's area that boxes of text lines cover, 0 to 1."""

    name, stage = "intensive_text", 4
    too_high = "the picture is full of text"

    def score(self, picture: Picture) -> float:
        covered = np.zeros(picture.work.shape[:2], bool)
        for line in picture.lines:
            left, top, right, bottom = (max(0, side) for side in line.box)
            covered[top:bottom, left:right] = True
        return float(covered.mean())


class SmallCharacters(Measure):
    """Median height of text lines over the picture's shorter side; None without text."""

    name, stage = "small_characters", 4
    too_low = "the characters are too small"

    def score(self, picture: Picture) -> float | None:
        if not picture.lines:
            return None
        heights = [line.box[3] - line.box[1] for line in picture.lines]
        return float(np.median(heights)) / min(picture.work.shape[:2])
