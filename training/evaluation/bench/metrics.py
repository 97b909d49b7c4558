"""The exact part of the benchmarks' scores, without pictures and judges."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from PIL import Image

from qwen_image_fast.training.evaluation.text_metrics import edit_distance

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def mean(values: Sequence[float]) -> float:
    """ValueError where there is none: a score of nothing is not zero."""
    if not values:
        raise ValueError("mean: values must not be empty")
    return sum(values) / len(values)


def with_dependencies(answers: Mapping[int, bool], parents: Mapping[int, Sequence[int]], once: bool = False) -> float:
    """Share of questions answered yes, where a question counts as no if one that it depends on (0: none) was no.

    Args:
        once: as OneIG, by the answers of the parents alone; else as DPG-Bench, where in the order of `parents` a parent
            that has become no makes its children no.
    """
    judged = {number: bool(yes) for number, yes in answers.items()}
    seen = dict(judged) if once else judged
    for number, depends in parents.items():
        if any(parent != 0 and not seen[parent] for parent in depends):
            judged[number] = False
    return mean([float(yes) for yes in judged.values()])


def crops(image: Image.Image, side: int = 2) -> list[Image.Image]:
    """The pictures of a grid, row by row. ValueError where it cannot be cut into equal ones."""
    if image.width % side or image.height % side:
        raise ValueError(f"crops: a grid must be divisible by {side} each way, got {image.width} x {image.height}")
    width, height = image.width // side, image.height // side
    return [
        image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height)) for y in range(side) for x in range(side)
    ]


def soft_tifa(scores: Sequence[float]) -> tuple[float, float]:
    """GenEval 2's arithmetic and geometric mean of a prompt's atoms."""
    return mean(scores), math.prod(scores) ** (1 / len(scores))


def same_answer(given: str, wanted: str) -> bool:
    """Whether two short answers say the same: case, marks and articles aside, 3 is three."""
    return _plain(given) == _plain(wanted)


def _plain(text: str) -> str:
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]
    return " ".join(NUMBERS[int(word)] if word.isdecimal() and int(word) < len(NUMBERS) else word for word in words)


def viescore(success: Sequence[float], quality: Sequence[float]) -> tuple[float, float, float]:
    """GEdit's SC and PQ, the least of their scores from 0 to 10, and their geometric mean."""
    sc, pq = min(success), min(quality)
    return sc, pq, math.sqrt(sc * pq)


def multiset_match(wanted: str, read: str, language: str) -> tuple[int, int]:
    """How many of the wanted words (Chinese: characters) were read, each as often as wanted, and how many there are.

    As LongText-Bench: only letters, digits and Han characters count, words are compared in lower case.
    """
    want, have = (Counter(_units(text, language)) for text in (wanted, read))
    return (want & have).total(), want.total()


def oneig_text(wanted: str, read: str, language: str) -> tuple[int, bool, int, int]:
    """Of a picture: edit distance, whether nothing is wrong, right units, units; of the texts without marks."""
    glue = "" if language == "zh" else " "
    want, have = (glue.join(_units(text, language)) for text in (wanted, read))
    distance = edit_distance(have, want)
    right, of = multiset_match(wanted, read, language)
    return distance, distance == 0, right, of


def oneig_text_score(rows: Sequence[tuple[int, bool, int, int]], language: str) -> float:
    """1 - min(most, ED) (1 - CR) (1 - WAC) / most, with most = 100 letters of English, 50 of Chinese."""
    most = 50 if language == "zh" else 100
    distance = mean([row[0] for row in rows])
    complete = mean([float(row[1]) for row in rows])
    accuracy = sum(row[2] for row in rows) / sum(row[3] for row in rows)
    return 1 - min(most, distance) * (1 - complete) * (1 - accuracy) / most


def _units(text: str, language: str) -> list[str]:
    if language == "zh":
        return re.findall(r"[\u4e00-\u9fff]|[0-9A-Za-z]", text)
    return re.findall(r"[^\W_]+", text.lower())
