"""What editing pairs say: instructions, and names of things and places, in English and Chinese."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .canvas import SHAPES, ShapeElement, TextElement
from .colours import COLOURS
from .sample import article, quote
from .shapes import shape_name

Element = TextElement | ShapeElement

# Kind → instructions in English and Chinese.
_INSTRUCTIONS = {
    "text": (("replace {old} with {new}", "change {old} to {new}"), ("把{old}改成{new}", "将{old}替换为{new}")),
    "colour": (("make {what} {colour}", "change the color of {what} to {colour}"), ("把{what}变成{colour}",)),
    "ground": (("change the ground to {colour}", "make the ground {colour}"), ("把背景换成{colour}",)),
    "add": (("add {what} at the {place}",), ("在{place}加上{what}",)),
    "remove": (("remove {what}", "erase {what}"), ("去掉{what}", "把{what}删掉")),
    "move": (("move {what} to the {place}",), ("把{what}移到{place}",)),
    "reconstruct": (("keep the picture as it is", "reproduce the picture"), ("保持图片不变", "重现这张图片")),
}
# Of a picture with a single text or shape: there is nothing to tell it from.
_OF_THE_ONLY_ONE = {
    "text": (("change the text to {new}",), ("把文字改成{new}",)),
    "colour": (("make it {colour}",), ("把它变成{colour}",)),
}
COLUMNS = {"left": "左", "center": "中", "right": "右"}
_COLUMN_NAMES = {"left": "左边", "center": "中间", "right": "右边"}
ROWS = {"top": "上", "middle": "中", "bottom": "下"}


def instruction_of(rng: random.Random, kind: str, language: str, only: bool = False, **words: str) -> str:
    """What turns a source into its target. only: the picture has a single thing."""
    english, chinese = _INSTRUCTIONS[kind]
    if only and kind in _OF_THE_ONLY_ONE and rng.random() < 0.5:
        english, chinese = _OF_THE_ONLY_ONE[kind]
    return rng.choice(chinese if language == "zh" else english).format(**words)


def definite(element: Element, language: str) -> str:
    """`the red circle`, `the text "CAT"`; `红色圆形`, `文字“猫”`."""
    if isinstance(element, ShapeElement):
        name = shape_name(element.shape, element.colour, language)
        return name if language == "zh" else f"the {name}"
    return ("文字" if language == "zh" else "the text ") + quote(element.text, language)


def any_name(rng: random.Random, element: Element, others: Sequence[Element], language: str) -> str:
    """One of the names by which an element can be told from the others: `definite`, `"CAT"`, `the circle`, `it`."""
    names = [definite(element, language)]
    if isinstance(element, ShapeElement):
        if element.shape not in {other.shape for other in others if isinstance(other, ShapeElement)}:
            names.append(SHAPES[element.shape] if language == "zh" else f"the {element.shape}")
    else:
        names.append(quote(element.text, language))
        if not any(isinstance(other, TextElement) for other in others):
            names.append("文字" if language == "zh" else "the text")
    if not others:
        names.append("它" if language == "zh" else "it")
    return rng.choice(names)


def indefinite(element: Element, language: str) -> str:
    """`a red circle`, `the red text "CAT"`; `一个红色圆形`, `红色文字“猫”`."""
    colour = COLOURS[element.colour].called(language)
    if isinstance(element, ShapeElement):
        name = shape_name(element.shape, element.colour, language)
        return f"一个{name}" if language == "zh" else f"{article(name)} {name}"
    text = quote(element.text, language)
    return f"{colour}文字{text}" if language == "zh" else f"the {colour} text {text}"


def place_name(row: str, column: str, language: str) -> str:
    """Of `ROWS` and `COLUMNS`: `top left`, `bottom`, `center`; `左上方`."""
    if row == "middle":
        return _COLUMN_NAMES[column] if language == "zh" else column
    if language == "zh":
        return (COLUMNS[column] if column != "center" else "") + ROWS[row] + "方"
    return row if column == "center" else f"{row} {column}"
