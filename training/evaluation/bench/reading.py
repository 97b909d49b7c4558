"""What a judge's answer means; ValueError where it means nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

SYSTEM = "You judge pictures. You answer exactly in the form that you are asked for, and say nothing else."
READ_ALL = (
    "Write down all the text that stands in the picture, line by line, and nothing else: no comment, no translation, "
    "no text twice. If there is no text, write NONE."
)


def yes_or_no(text: str) -> bool:
    """The first word."""
    found = re.match(r"\W*(yes|no)\b", text.strip().lower())
    if not found:
        raise ValueError("the answer must begin with yes or no")
    return found[1] == "yes"


def yes_or_no_lines(count: int) -> Callable[[str], list[bool]]:
    """As many lines that begin with yes or no, maybe numbered; other lines do not count."""

    def read(text: str) -> list[bool]:
        found = re.findall(r"^\W*(?:\d+\W+)?(yes|no)\b", text.lower(), re.MULTILINE)
        if len(found) != count:
            raise ValueError(f"the answer must have {count} lines of yes or no, got {len(found)}")
        return [word == "yes" for word in found]

    return read


def short(text: str) -> str:
    """The first line of an answer that has one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the answer must not be empty")
    return lines[0]


def read_text(text: str) -> str:
    """What was read; NONE is nothing."""
    return "" if text.strip().strip(".").upper() == "NONE" else text.strip()


def scores(count: int, low: float, high: float) -> Callable[[str], list[float]]:
    """So many numbers in a range, from the list `score` of a JSON object somewhere in the answer."""

    def read(text: str) -> list[float]:
        found = json_in(text, "{", "}")
        values = found.get("score") if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != count or not all(_number(v) for v in values):
            raise ValueError(f"the answer must have {count} scores")
        if not all(low <= v <= high for v in values):
            raise ValueError(f"scores must be from {low:g} to {high:g}, got {values}")
        return [float(v) for v in values]

    return read


def score_lines(count: int, low: int, high: int) -> Callable[[str], list[float]]:
    """So many lines that end in `: <whole number>`."""

    def read(text: str) -> list[float]:
        found = re.findall(r"^[^\n:]*:\s*(\d+)\s*(?:/\s*\d+)?\W*$", text, re.MULTILINE)
        values = [float(v) for v in found]
        if len(values) != count or not all(low <= v <= high for v in values):
            raise ValueError(f"the answer must have {count} lines with a score from {low} to {high}, got {found}")
        return values

    return read


def objects(text: str) -> list[dict[str, Any]]:
    """The objects of a JSON list somewhere in the answer: class, score in [0, 1], box, and maybe color."""
    found = json_in(text, "[", "]")
    if not isinstance(found, list):
        raise ValueError("the answer must be a list of objects")
    read = []
    for one in found:
        box = one.get("box") if isinstance(one, dict) else None
        if not isinstance(box, list) or len(box) != 4 or not all(_number(v) for v in [*box, one.get("score")]):
            raise ValueError("an object must have class, score and box")
        if not isinstance(one.get("class"), str):
            raise ValueError("an object must have a class")
        read.append(dict(one))
    return read


def json_in(text: str, first: str, last: str) -> Any:
    """The JSON from the first of a mark to the last of another, in a block of code or not."""
    start, end = text.find(first), text.rfind(last)
    if start < 0 or end < start:
        raise ValueError("the answer must have JSON")
    try:
        return json.loads(text[start : end + 1])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("the answer must be JSON") from error


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
