"""What a benchmark asks a model for, what it asks a judge, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Item:
    """A prompt. id: unique, of letters, digits and `-`; group: what the scores are by; source: a picture to edit."""

    id: str
    prompt: str
    group: str
    data: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None


@dataclass(frozen=True)
class Question:
    """Something that a judge is asked about pictures.

    Attributes:
        key: unique. pictures: files, the one in question last.
        read: the answer's meaning, as JSON can hold it. Raises ValueError where the answer has none.
        data: of the item, for judges that are no language models.
    """

    key: str
    system: str
    prompt: str
    pictures: tuple[Path, ...]
    read: Callable[[str], Any]
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a judge said to a question and what it means; value None: it made no sense, however often it was asked."""

    key: str
    text: str
    value: Any


@dataclass(frozen=True)
class Row:
    """A score and over how many pictures or answers it is; clip: it is by the CLIP of --clip, not by the judge."""

    name: str
    value: float
    of: int
    clip: bool = False


@dataclass(frozen=True)
class Scored:
    """Scores, and of the pictures that are not right (key of item and picture) what is wrong."""

    rows: list[Row]
    wrong: dict[str, str]
    notes: tuple[str, ...] = ()


Answers = Mapping[str, Answer]


@dataclass(frozen=True)
class Benchmark:
    """A protocol.

    Attributes:
        title: as its authors write it. pictures: of each prompt.
        load: (path of the prompts, language, folder for sources) -> items.
        ask: (item, number of the picture, its file) -> questions; none: the pictures are measured, not judged.
        score: (items, pictures of each, answers by key, files by `picture_key`) -> scores.
        judges: what may judge, in the order of preference: `chat`, `reader`, `detections`; empty: nothing does.
        languages: that it has sets of.
        ask_clip: as `ask`, what a CLIP is asked, where one is given and the benchmark has a score by one.
    """

    title: str
    load: Callable[[Path, str, Path], list[Item]]
    ask: Callable[[Item, int, Path], list[Question]]
    score: Callable[[Sequence[Item], int, Answers], Scored]
    pictures: int = 1
    judges: tuple[str, ...] = ("chat",)
    languages: tuple[str, ...] = ("en",)
    ask_clip: Callable[[Item, int, Path], list[Question]] | None = None


def picture_key(item: Item, number: int) -> str:
    """Of a picture, and the stem of its file."""
    return f"{item.id}-{number}"
