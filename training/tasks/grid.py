"""Pictures side by side, for the log."""

from __future__ import annotations

import numpy as np


def grid(images: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Images uint8 [H, W, 3] of one size side by side, white where there is none."""
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    out = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        out[y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    return out
