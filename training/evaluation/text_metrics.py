"""Text-rendering metrics: word accuracy and edit distance of CVTG-2K, text score of LongText-Bench, exact match.

CVTG-2K (TextCrafter, arXiv 2503.23461, `unified_metrics_eval.py`) and LongText-Bench (X-Omni, arXiv 2507.22058) read
pictures with PaddleOCR and with a vision-language model; here a `Reader` does. The definitions are theirs.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextScore:
    """Of one picture.

    Attributes:
        words, words_right: wanted words, and those that are among the words read; lower-cased.
        similarities: for each wanted word 1 - edit distance / length, of the most similar word read.
        units, units_right: words of English, characters of Chinese, and how many were read, each as often as wanted.
        exact: the lines read are the wanted ones, in order; white space is ignored, case is not.
    """

    words: int
    words_right: int
    similarities: tuple[float, ...]
    units: int
    units_right: int
    exact: bool


def score(wanted: Sequence[str], read: Sequence[str], language: str = "en") -> TextScore:
    """Compare the wanted texts of a picture with the lines read in it, both from top to bottom.

    A Chinese text counts as one word, as it has no spaces.
    """
    want, have = _words(wanted), _words(read)
    units, seen = (_units(texts, language) for texts in (wanted, read))
    return TextScore(
        words=len(want),
        words_right=sum(word in have for word in want),
        similarities=tuple(_similarity(word, have) for word in want),
        units=units.total(),
        units_right=(units & seen).total(),
        exact=_compact(wanted) == _compact(read),
    )


@dataclass(frozen=True)
class TextSummary:
    """Over pictures, each in [0, 1]; higher is better.

    Attributes:
        pictures: how many.
        word_accuracy: right words / wanted words (CVTG-2K).
        ned: mean similarity of all wanted words (CVTG-2K's normalised edit distance, 1 is perfect).
        text_score: right units / wanted units (LongText-Bench).
        exact: share of pictures that say what was wanted and nothing else, case included.
    """

    pictures: int
    word_accuracy: float
    ned: float
    text_score: float
    exact: float


def summarise(scores: Sequence[TextScore]) -> TextSummary:
    if not scores:
        raise ValueError("summarise: scores must not be empty")
    similarities = [value for score in scores for value in score.similarities]
    return TextSummary(
        len(scores),
        _ratio(sum(s.words_right for s in scores), sum(s.words for s in scores)),
        _ratio(sum(similarities), len(similarities)),
        _ratio(sum(s.units_right for s in scores), sum(s.units for s in scores)),
        _ratio(sum(s.exact for s in scores), len(scores)),
    )


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of a character."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in text.lower().split()]


def _similarity(word: str, words: Sequence[str]) -> float:
    best = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return 1 - edit_distance(word, best[0]) / (max(len(word), len(best[0])) + 1e-5) if best else 0.0


def _units(texts: Sequence[str], language: str) -> Counter[str]:
    if language == "zh":
        return Counter(c for text in texts for c in text if not c.isspace() and not _is_mark(c))
    return Counter("".join(c for c in word if not _is_mark(c)) for word in _words(texts))


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def _compact(texts: Sequence[str]) -> str:
    return "".join("".join(texts).split())
