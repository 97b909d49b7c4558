"""What the data filters measure of an RGB picture, in one pass over its bytes. Of numpy arrays, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_image_fast import _C
from qwen_image_fast.ops import _library as lib

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class PictureStatistics:
    """Y is 0.299 R + 0.587 G + 0.114 B (BT.601), 0 to 255; * is a convolution, over pixels that have all neighbours.

    Attributes:
        luma: Y, float32 [height, width].
        histogram: int64 [3, 256], the number of pixels of each value, by colour.
        luma_sum, saturation_sum: of Y; of (max - min) / max(max, 1) over a pixel's three colours.
        gradient: mean squared difference of Y between neighbours in a column, plus that in a row.
        laplacian: mean of (Y * [[0, 1, 0], [1, -4, 1], [0, 1, 0]])^2.
        noise: mean of |Y * [[1, -2, 1], [-2, 4, -2], [1, -2, 1]]| (Immerkaer, CVIU 1996).

        The last three are None for pictures of fewer than 3 pixels in height or width.
    """

    luma: np.ndarray
    histogram: np.ndarray
    luma_sum: float
    saturation_sum: float
    gradient: float | None
    laplacian: float | None
    noise: float | None


def picture_statistics(rgb: np.ndarray) -> PictureStatistics:
    """The statistics of a uint8 array [height, width, 3] with at least one pixel.

    Arithmetic in float32, sums of a row as trees, over rows in float64; the same bits each time. On one thread, without
    the interpreter's lock: pictures are many, threads are for them.

    Raises:
        ValueError: another shape or dtype.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise ValueError(
            f"picture_statistics: rgb must be uint8 [height, width, 3], not empty, got {rgb.dtype} {rgb.shape}"
        )
    if lib.use_reference():
        return picture_statistics_reference(rgb)
    rgb = np.ascontiguousarray(rgb)
    height, width = rgb.shape[:2]
    luma, histogram, sums = np.empty((height, width), np.float32), np.empty((3, 256), np.int64), np.empty(6)
    _C.picture_statistics(rgb.ctypes.data, luma.ctypes.data, histogram.ctypes.data, sums.ctypes.data, height, width)
    y, saturation, down, across, laplacian, noise = sums.tolist()
    if height < 3 or width < 3:
        return PictureStatistics(luma, histogram, y, saturation, None, None, None)
    inner = (height - 2) * (width - 2)
    gradient = down / ((height - 1) * width) + across / (height * (width - 1))
    return PictureStatistics(luma, histogram, y, saturation, gradient, laplacian / inner, noise / inner)


def picture_statistics_reference(rgb: np.ndarray) -> PictureStatistics:
    """The formulas in numpy, one after the other."""
    y = rgb.astype(np.float32) @ _LUMA
    red, green, blue = planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))  # numpy is slow over the last axis
    high = np.maximum(np.maximum(red, green), blue)
    spread = high - np.minimum(np.minimum(red, green), blue)
    saturation = float(np.divide(spread, np.maximum(high, 1), dtype=np.float32).sum(dtype=np.float64))
    histogram = np.stack([np.bincount(plane.ravel(), minlength=256) for plane in planes])
    luma_sum = float(y.sum(dtype=np.float64))
    if min(y.shape) < 3:
        return PictureStatistics(y, histogram, luma_sum, saturation, None, None, None)
    gradient = np.square(y[1:] - y[:-1]).mean() + np.square(y[:, 1:] - y[:, :-1]).mean()
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    vertical = y[:-2] - 2 * y[1:-1] + y[2:]
    noise = vertical[:, :-2] - 2 * vertical[:, 1:-1] + vertical[:, 2:]
    return PictureStatistics(
        y, histogram, luma_sum, saturation, float(gradient), float(np.square(laplacian).mean()),
        float(np.abs(noise).mean()),
    )  # fmt: skip
