"""Rewards that read: how near the text in a picture is to the text that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_image_fast.training.evaluation.bands import BandReader, bands
from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.colour_metrics import ground_colour, text_colour
from qwen_image_fast.training.evaluation.edit_checks import KEPT, as_placed, must_be_read, seen_done
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.evaluation.text_metrics import edit_distance
from qwen_image_fast.training.recipe.rewards import TextReward
from qwen_image_fast.training.rewards.reward import Asked
from qwen_image_fast.training.synthesis.colours import COLOURS, TINY_GROUND_COLOURS, TINY_TEXT_COLOURS

_LOST = 18.0  # dB outside an edit's mask at which nothing of the reward is left


def likeness(read: str, wanted: str) -> float:
    """1 - min(1, edit distance / length of what was wanted): white space apart, case and extra characters count.

    Rewards that are full where the wanted text is a part of the read one are answered by spam; here that costs.
    """
    read, wanted = "".join(read.split()), "".join(wanted.split())
    return 1 - min(1.0, edit_distance(read, wanted) / len(wanted)) if wanted else float(not read)


def unknown_colour(asked: Asked) -> str | None:
    """Why a named colour of the ground, or of a text, can never be right: it is none of those that are told apart."""
    for role, colour in asked.colours.items():
        if (role == "ground" or role.split()[0] == "text") and colour not in COLOURS:
            return f"colours.{role} must be of {', '.join(COLOURS)}, got {colour!r}"
    return None


class Text:
    """The mean likeness of the texts asked for, times `wrong_colour` where a named colour is wrong.

    Where the layout is known, each text's band is read by recognition alone: `evaluation/bands.py`. Otherwise text is
    looked for, and all lines from top to bottom are compared with all texts.
    """

    name = "text"

    def __init__(self, settings: TextReward | None = None):
        self.settings = settings or TextReward()
        self._band: BandReader | None = None
        self._page: Reader | None = None

    def refuses(self, asked: Asked) -> str | None:
        if not asked.texts:
            return "kind text needs prompts that quote a text, or name it in texts"
        if self.settings.layout == "band" and len(asked.boxes) != len(asked.texts):
            return "layout band needs prompts whose layout is known, which the synthesis has: layout page reads others"
        return unknown_colour(asked)

    def __call__(self, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
        return [self._one(picture, about) for picture, about in zip(pictures, asked)]

    def _one(self, picture: np.ndarray, asked: Asked) -> float:
        known = len(asked.boxes) == len(asked.texts)
        if known and self.settings.layout != "page":
            self._band = self._band or BandReader()
            read = self._band.read(picture, bands(asked.boxes, picture.shape[:2]))
            value = float(np.mean([likeness(a, b) for a, b in zip(read, asked.texts)]))
        else:
            self._page = self._page or Reader(side=self.settings.side, turned=False)
            lines = self._page.read(picture)
            value = likeness("".join(line.text for line in lines), "".join(asked.texts))
        right = colours_right(picture, asked)
        return value if right is None or all(right) else value * self.settings.wrong_colour


def colours_right(picture: np.ndarray, asked: Asked) -> list[bool] | None:
    """Of the ground and of each text that has a named colour; None where none is named."""
    if not asked.colours:
        return None
    right = []
    if ground := asked.colours.get("ground"):
        names = TINY_GROUND_COLOURS if ground in TINY_GROUND_COLOURS else tuple(COLOURS)
        right.append(ground_colour(picture, names) == ground)
    whole = (0, 0, picture.shape[1], picture.shape[0])
    boxes = asked.boxes if len(asked.boxes) == len(asked.texts) else [whole] * min(1, len(asked.texts))
    for number, box in enumerate(boxes):
        if colour := asked.colours.get(f"text {number}" if number else "text"):
            names = TINY_TEXT_COLOURS if colour in TINY_TEXT_COLOURS else tuple(COLOURS)
            right.append(text_colour(picture, box, names) == colour)
    return right or None


class Edit:
    """Whether an edit was done, times what is left of the rest: 1 from 28 dB outside the edit's mask on, 0 at 18 dB.

    Texts that were changed, added or moved are read, and those whose ground was; every other kind is judged by pixels
    alone against the pair's target (`edit_checks.py`).
    """

    name = "edit"

    def __init__(self) -> None:
        self._reader: Reader | None = None

    def refuses(self, asked: Asked) -> str | None:
        if asked.edit is None:
            return "kind edit needs edits whose target is known: data.source synthesis with data.tasks={ti2i: 1}"
        return None

    def __call__(self, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
        return [self._one(picture, about) for picture, about in zip(pictures, asked)]

    def _one(self, picture: np.ndarray, asked: Asked) -> float:
        pair = asked.edit
        assert pair is not None
        pair = as_placed(pair, picture)
        seen = seen_done(pair, picture)
        value = float(seen is not False)
        if seen is None or (seen and must_be_read(pair)):
            self._reader = self._reader or Reader(side=320, turned=False)
            value = likeness("".join(line.text for line in self._reader.read(picture)), "".join(pair.target_lines))
        kept = psnr_outside(picture, pair.target, pair.mask)
        return value if np.isnan(kept) else value * float(np.clip((kept - _LOST) / (KEPT - _LOST), 0, 1))
