"""What the generator returns: a picture with its caption, or a pair of pictures with an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside

# Tried in this order: the first pair whose marks do not occur in the text.
_QUOTES = {
    "en": (('"', '"'), ("“", "”"), ("「", "」")),
    "zh": (("“", "”"), ("「", "」"), ('"', '"')),
}
_CLOSING = {'"': '"', "“": "”", "「": "」"}


@dataclass(frozen=True)
class Sample:
    """A picture whose text is known.

    Attributes:
        image: uint8 array of height x width x 3.
        caption: describes the picture; quotes every text of `lines`, in order.
        lines: the texts drawn. A paragraph is one text, with the spaces it had before it was broken into lines.
        language: of caption and text, `en` or `zh`.
        colours: role → English colour name, such as {"text": "red", "ground": "white"}.
        boxes: the area of each text of `lines` (of each shape or solid, where there is no text).
        strategy: `shapes`, `pure`, `compositional`, `complex` or `scenes`.
    """

    image: np.ndarray
    caption: str
    lines: tuple[str, ...]
    language: str
    colours: dict[str, str]
    boxes: tuple[Box, ...]
    strategy: str


@dataclass(frozen=True)
class Description:
    """What a `Sample` tells, without its picture and without places."""

    caption: str
    lines: tuple[str, ...]
    language: str
    colours: dict[str, str]


@dataclass(frozen=True)
class EditSample:
    """A pair of pictures that differ by what an instruction says.

    Attributes:
        source, target: uint8 arrays of height x width x 3.
        instruction: what turns source into target.
        mask: bool array of height x width; outside it the pictures are equal.
        kind: `text`, `colour`, `ground`, `add`, `remove`, `move` or `reconstruct`; of scenes see `vision`.
        language: of instruction and text, `en` or `zh`.
        source_lines, target_lines: the texts in each picture.
        strategy: of the pictures, as in `Sample`.
        boxes: the area of each text of `target_lines`; of shapes and pure alone.
    """

    source: np.ndarray
    target: np.ndarray
    instruction: str
    mask: np.ndarray
    kind: str
    language: str
    source_lines: tuple[str, ...]
    target_lines: tuple[str, ...]
    strategy: str
    boxes: tuple[Box, ...] = ()


def quotable(text: str) -> bool:
    """Whether some kind of quotation marks can enclose the text."""
    return any(opening not in text and closing not in text for opening, closing in _QUOTES["en"])


def quote(text: str, language: str) -> str:
    """The text in quotation marks of the language, or in others where it contains those itself."""
    for opening, closing in _QUOTES[language]:
        if opening not in text and closing not in text:
            return f"{opening}{text}{closing}"
    raise ValueError(f"quote: text must leave one kind of quotation marks unused, got {text}")


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Numbers of the boxes as their texts are read: rows from top to bottom, each from left to right.

    A box is in the row of the topmost one that is left if its middle is beside that one.
    """
    left, order = sorted(range(len(boxes)), key=lambda i: boxes[i][1]), []
    while left:
        first = boxes[left[0]]
        row = [i for i in left if 2 * first[1] <= boxes[i][1] + boxes[i][3] <= 2 * first[3]]
        order += sorted(row, key=lambda i: boxes[i][0])
        left = [i for i in left if i not in row]
    return order


def quoted_texts(caption: str) -> tuple[str, ...]:
    """The texts that a caption quotes, in order; the inverse of `quote`."""
    found, position = [], 0
    while position < len(caption):
        closing = _CLOSING.get(caption[position])
        end = caption.find(closing, position + 1) if closing else -1
        if end >= 0:
            found.append(caption[position + 1 : end])
            position = end
        position += 1
    return tuple(found)


def article(word: str) -> str:
    """`a` or `an`, for the words used in captions."""
    return "an" if word[0] in "aeiou" else "a"
