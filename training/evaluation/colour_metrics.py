"""Which named colours a picture's ground and text have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_image_fast.training.synthesis.colours import COLOURS

Box = tuple[int, int, int, int]


def ground_colour(image: np.ndarray, names: Sequence[str]) -> str:
    """The named colour nearest to the median colour of the picture's edge, of `names`; image uint8 [H, W, 3]."""
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return nearest_colour(np.median(edge, axis=0), names)


def text_colour(image: np.ndarray, box: Box, names: Sequence[str]) -> str | None:
    """The named colour of what stands out in a box (left, top, right, bottom); None where nothing does.

    The ground is the median of the picture's edge. The text's colour is the median of those pixels that are at least
    0.7 times as far from it as the farthest: strokes without their blurred edges.
    """
    left, top, right, bottom = box
    inside = image[max(0, top) : bottom, max(0, left) : right].reshape(-1, 3).astype(np.float64)
    if not len(inside):
        return None
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    distance = np.linalg.norm(inside - np.median(edge, axis=0), axis=1)
    farthest = float(np.quantile(distance, 0.98))
    if farthest < 40:
        return None
    return nearest_colour(np.median(inside[distance >= 0.7 * farthest], axis=0), names)


def nearest_colour(rgb: np.ndarray, names: Sequence[str]) -> str:
    """The name, of `names`, whose colour is the nearest in RGB."""
    return min(names, key=lambda name: float(np.linalg.norm(np.asarray(COLOURS[name].rgb) - rgb)))
