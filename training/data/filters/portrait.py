"""Stage 6, portraits: faces that were made unrecognisable."""

from __future__ import annotations

import numpy as np

from .base import Measure
from .picture import Picture

_WINDOW = 64
_PERIODS = range(5, 22)


class FaceMosaic(Measure):
    """How much of the best window of 64 px looks like a mosaic: squares of one colour on a grid; 0 to 1, for People.

    In a window, the steps between neighbouring columns (and rows) are summed over the window. In a mosaic of squares of
    p pixels, every p-th holds them all. Score: the largest, over windows and p = 5 to 21, of the smaller of the two
    directions' share of steps on the grid, less the share that chance gives, 1 / p, scaled to 1. It finds a mosaic
    anywhere in the picture, not only on a face, and no Gaussian blur. Measured on the pixels as stored, on a grid of
    half windows; None for other categories.
    """

    name, stage = "face_mosaic", 6
    too_high = "a part of the picture is a mosaic"

    def score(self, picture: Picture) -> float | None:
        if picture.record.category != "People":
            return None
        grey = picture.grey
        best = 0.0
        for top in range(0, grey.shape[0] - _WINDOW, _WINDOW // 2):
            for left in range(0, grey.shape[1] - _WINDOW, _WINDOW // 2):
                window = grey[top : top + _WINDOW + 1, left : left + _WINDOW + 1]
                across = np.abs(np.diff(window, axis=1)).sum(0)
                down = np.abs(np.diff(window, axis=0)).sum(1)
                if min(across.mean(), down.mean()) > 0.5 * _WINDOW:
                    best = max(best, _on_grid(across, down))
        return best


def _on_grid(across: np.ndarray, down: np.ndarray) -> float:
    best = 0.0
    for period in _PERIODS:
        shares = []
        for steps in (across, down):
            sums = np.bincount(np.arange(len(steps)) % period, steps)
            shares.append((sums.max() / steps.sum() - 1 / period) / (1 - 1 / period))
        best = max(best, min(shares))
    return float(best)
