"""Sizes of training pictures: the nearest bucket, and the picture cut to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image


def nearest_bucket(height: int, width: int, buckets: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The bucket with the nearest aspect ratio, on a logarithmic scale; of equally near ones the nearest area."""

    def distance(bucket: Sequence[int]) -> tuple[float, float]:
        ratio = math.log(height / width) - math.log(bucket[0] / bucket[1])
        return round(abs(ratio), 9), abs(math.log(height * width / (bucket[0] * bucket[1])))

    best = min(buckets, key=distance)
    return best[0], best[1]


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale an image until it covers `size` and cut what is left over on both sides; uint8 [height, width, 3]."""
    height, width = size
    if image.shape[:2] == size:
        return image
    scale = max(height / image.shape[0], width / image.shape[1])
    inner = max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale))
    scaled = Image.fromarray(image).resize(inner[::-1], Image.Resampling.LANCZOS)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height)))
