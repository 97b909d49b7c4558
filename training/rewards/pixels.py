"""Rewards that look at pixels alone: named colours, and where a text stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_image_fast.training.evaluation.edit_checks import ink
from qwen_image_fast.training.rewards.reward import Asked
from qwen_image_fast.training.rewards.texts import colours_right, unknown_colour

_MARGIN = 1 / 16  # of the picture's height: a text may stand so far from where its rendering does
_LEAST_INK = 0.05  # share of a text's box that must stand out from the ground


class Colour:
    """The share of the named colours, of ground and texts, that are right."""

    name = "colour"

    def refuses(self, asked: Asked) -> str | None:
        if not any(role == "ground" or (role.split()[0] == "text" and asked.texts) for role in asked.colours):
            return "kind colour needs prompts with colours of the ground or of a text, which the synthesis has"
        return unknown_colour(asked)

    def __call__(self, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
        return [float(np.mean(colours_right(p, about) or [False])) for p, about in zip(pictures, asked)]


class Layout:
    """The share of what stands out that stands in the texts' boxes, with a margin, times the share of boxes that are
    not empty."""

    name = "layout"

    def refuses(self, asked: Asked) -> str | None:
        if not asked.boxes:
            return "kind layout needs prompts whose layout is known, which the synthesis has"
        return None

    def __call__(self, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> list[float]:
        return [self._one(picture, about) for picture, about in zip(pictures, asked)]

    def _one(self, picture: np.ndarray, asked: Asked) -> float:
        out, margin = ink(picture), round(picture.shape[0] * _MARGIN)
        inside, filled = np.zeros_like(out), []
        for left, top, right, bottom in asked.boxes:
            rows, columns = slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)
            inside[rows, columns] = True
            filled.append(out[rows, columns].sum() >= _LEAST_INK * (right - left) * (bottom - top))
        return float((out & inside).sum() / max(1, out.sum()) * np.mean(filled))
