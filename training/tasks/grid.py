"""Pictures side by side, for the log."""

from __future__ import annotations

import numpy as np


def grid(images: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Images uint8 [H, W, 3] side by side in cells of the largest one's size, white where there is none."""
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    out = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        out[y * height :, x * width :][: image.shape[0], : image.shape[1]] = image
    return out
