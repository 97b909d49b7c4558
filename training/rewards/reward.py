"""What a reward is: pictures and what was asked for in, a number for each out; and what is no reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from qwen_image_fast.training.synthesis.sample import Box, EditSample, Sample, quoted_texts


class RewardError(RuntimeError):
    """A sentence about a reward that cannot be used."""


@dataclass(frozen=True)
class Asked:
    """What a picture was asked to show.

    Attributes:
        prompt: the caption, or an edit's instruction.
        texts: those that it names, from top to bottom. language: of them, en or zh.
        colours: role → colour name, as in `synthesis.Sample`.
        boxes: where each text stands, where that is known: left, top, right, bottom in pixels of the picture.
        edit: the pair whose source was edited, where its target is known.
        fields: what else the line of a prompts file says.
    """

    prompt: str
    texts: tuple[str, ...] = ()
    language: str = "en"
    colours: Mapping[str, str] = field(default_factory=dict)
    boxes: tuple[Box, ...] = ()
    edit: EditSample | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


class Reward(Protocol):
    """name: in the log."""

    name: str

    def refuses(self, asked: Asked) -> str | None:
        """Why pictures of such a prompt cannot be rewarded; None: they can."""

    def __call__(self, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> Sequence[float]:
        """A number for each picture, uint8 [H, W, 3]; higher is better. A function of its arguments alone."""


def asked_of(caption: str, drawn: Sample | EditSample | None) -> Asked:
    """Of a caption, and of what the synthesis knows about its picture."""
    if isinstance(drawn, EditSample):
        return Asked(caption, drawn.target_lines, drawn.language, edit=drawn)
    if drawn is not None:
        boxes = drawn.boxes if drawn.lines else ()
        return Asked(caption, drawn.lines, drawn.language, drawn.colours, boxes)
    texts = quoted_texts(caption)
    return Asked(caption, texts, language_of(texts))


def language_of(texts: Sequence[str]) -> str:
    """zh where a text has a Han character."""
    return "zh" if any("\u4e00" <= c <= "\u9fff" for text in texts for c in text) else "en"


def scored(reward: Reward, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
    """What a reward gives, checked.

    Raises:
        RewardError: it gave another number of rewards than there are pictures, or one that is no finite number.
    """
    given = reward(pictures, asked)
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {reward.name}: it must give a number for each picture, got {given!r:.80}") from error
    if len(values) != len(pictures):
        raise RewardError(
            f"reward {reward.name}: it must give a number for each picture, got {len(values)} for {len(pictures)}"
        )
    for value, about in zip(values, asked):
        if not math.isfinite(value):
            raise RewardError(f"reward {reward.name}: it must be a finite number, got {value} for {about.prompt!r:.80}")
    return values
