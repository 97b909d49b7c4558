"""Sizes of training pictures: the nearest bucket, and the picture cut to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

# Shapes this near to each other, as a ratio of their ratios, are cut alike: an edit then stays where it was.
ALIKE = 1.03
# Buckets of one ratio and several areas differ by their rounding to whole tokens.
ONE_SHAPE = 1.05
_GRID = 16  # pixels of a token


def nearest_bucket(height: int, width: int, buckets: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The bucket with the nearest aspect ratio, on a logarithmic scale; of those of one shape the nearest area."""

    def off(bucket: Sequence[int]) -> float:
        return round(abs(math.log(height / width) - math.log(bucket[0] / bucket[1])), 9)

    least = min(map(off, buckets))
    shape = next(bucket for bucket in buckets if off(bucket) == least)
    best = min(
        (bucket for bucket in buckets if _near(bucket, shape, ONE_SHAPE)),
        key=lambda bucket: (abs(math.log(height * width / (bucket[0] * bucket[1]))), off(bucket)),
    )
    return best[0], best[1]


def size_for(height: int, width: int, buckets: Sequence[Sequence[int]], upscale: bool) -> tuple[int, int]:
    """The size that a picture is trained at: of the bucket with the nearest ratio, and of those the nearest area.

    Unless `upscale`, buckets for which it would be enlarged are left out; a picture for which all would be has the
    nearest one's shape, as large as it covers, in multiples of 16 pixels.
    """
    if upscale:
        return nearest_bucket(height, width, buckets)
    if fitting := [bucket for bucket in buckets if bucket[0] <= height and bucket[1] <= width]:
        best, free = nearest_bucket(height, width, fitting), nearest_bucket(height, width, buckets)
        if _near(best, free, ONE_SHAPE):
            return best
    bucket = nearest_bucket(height, width, buckets)
    scale = min(height / bucket[0], width / bucket[1], 1.0)
    small = [max(_GRID, int(side * scale + 1e-9) // _GRID * _GRID) for side in bucket]
    return small[0], small[1]


def too_small(shapes: Iterable[Sequence[int]], upscale: bool) -> str:
    """What is wrong with pictures of (height, width), a sentence; empty where all cover a token, the smallest size that
    they could be trained at without being enlarged."""
    least = min(shapes, key=lambda shape: min(shape[:2]))
    if upscale or min(least[:2]) >= _GRID:
        return ""
    return f"it is {least[0]} x {least[1]} pixels, less than {_GRID} on a side; data.upscale=true enlarges it"


def sizes_for(
    shapes: Sequence[Sequence[int]], buckets: Sequence[Sequence[int]], upscale: bool
) -> list[tuple[int, int]]:
    """The sizes of a target and its references, (height, width) of each: a reference of the target's shape has its
    size, so that what an edit leaves alone stays in its place; one of another shape has its own."""
    target = size_for(shapes[0][0], shapes[0][1], buckets, upscale)
    return [
        target if _near(shape, shapes[0], ALIKE) else size_for(shape[0], shape[1], buckets, upscale) for shape in shapes
    ]


def _near(one: Sequence[int], other: Sequence[int], factor: float) -> bool:
    """Whether two (height, width) have the same ratio, up to a factor."""
    return 1 / factor <= (one[0] / one[1]) / (other[0] / other[1]) <= factor


def covering(shape: Sequence[int], size: tuple[int, int]) -> tuple[float, float]:
    """By how much `fit` scales a picture, and the share of it that is then cut off."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    return scale, max(0.0, 1 - size[0] * size[1] / (shape[0] * shape[1] * scale**2))


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale an image until it covers `size` and cut what is left over on both sides; uint8 [height, width, 3], or a
    mask of [height, width]."""
    height, width = size
    if image.shape[:2] == size:
        return image
    scale = max(height / image.shape[0], width / image.shape[1])
    inner = max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale))
    scaled = Image.fromarray(image).resize(inner[::-1], Image.Resampling.LANCZOS)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height)))


def token_weights(mask: np.ndarray) -> np.ndarray:
    """float32 [tokens] of a mask, uint8 [height, width]: the mean of each square of 16 pixels, 0 to 1, row by row."""
    height, width = (side // _GRID for side in mask.shape)
    squares = mask.reshape(height, _GRID, width, _GRID).astype(np.float32)
    return (squares.mean((1, 3)) / 255).reshape(-1)
