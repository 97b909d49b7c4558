"""Stage 2, quality: numbers of the pixels, on a picture of at most 512 pixels (`Picture.work`)."""

from __future__ import annotations

import math

import numpy as np

from .base import Filter, Measure, Verdict
from .picture import Picture


class Rotation(Filter):
    """Rejects pictures that EXIF says to turn: the pixels are not upright, and captions of them say so or are wrong.

    Score: the EXIF orientation, 1 to 8.
    """

    name, stage = "rotation", 2

    def judge(self, picture: Picture) -> Verdict:
        value = picture.orientation
        turned = 2 <= value <= 8
        return Verdict(float(value), f"the picture is stored turned: EXIF orientation {value}" if turned else None)


class Clarity(Measure):
    """mean(laplacian(Y)^2) / mean(|gradient(Y)|^2), low for blur.

    The variance of the Laplacian alone (Pech-Pacheco et al., ICPR 2000) also falls with contrast, and differs a
    hundredfold between a lawn and a sky; over the gradient's energy it is the mean square frequency of the picture's
    edges, which blur by a Gaussian of deviation s limits to the order of 1 / s^2. None for a picture of one colour,
    which `rgb_entropy` rejects.
    """

    name, stage = "clarity", 2
    too_low = "the picture is blurred"

    def score(self, picture: Picture) -> float | None:
        y = picture.luma
        if min(y.shape) < 3:
            return None
        gradient = np.square(y[1:] - y[:-1]).mean() + np.square(y[:, 1:] - y[:, :-1]).mean()
        if gradient < 1e-3:
            return None
        laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
        return float(np.square(laplacian).mean() / gradient)


class Luma(Measure):
    """Mean of Y / 255."""

    name, stage = "luma", 2
    too_low, too_high = "the picture is too dark", "the picture is too bright"

    def score(self, picture: Picture) -> float:
        return float(picture.luma.mean()) / 255


class Saturation(Measure):
    """Mean saturation of HSV: (max - min) / max of a pixel's three colours, 0 for black."""

    name, stage = "saturation", 2
    too_high = "the colours are unnaturally strong"

    def score(self, picture: Picture) -> float:
        red, green, blue = picture.planes  # numpy is ten times slower over the last axis
        high = np.maximum(np.maximum(red, green), blue)
        spread = high - np.minimum(np.minimum(red, green), blue)
        return float(np.divide(spread, np.maximum(high, 1), dtype=np.float32).mean())


class RgbEntropy(Measure):
    """Shannon entropy in bits of the histogram of 256 values, mean of the three colours: low for plain areas."""

    name, stage = "rgb_entropy", 2
    too_low = "large areas are plain"

    def score(self, picture: Picture) -> float:
        total = 0.0
        for plane in picture.planes:
            shares = np.bincount(plane.ravel(), minlength=256) / plane.size
            shares = shares[shares > 0]
            total -= float((shares * np.log2(shares)).sum())
        return total / 3


class Texture(Measure):
    """Deviation of noise by Immerkaer (CVIU 1996): sqrt(pi / 2) / 6 mean |Y * [[1, -2, 1], [-2, 4, -2], [1, -2, 1]]|.

    High for noise and for textures too fine to learn.
    """

    name, stage = "texture", 2
    too_high = "the picture is noisy or its texture too fine"

    def score(self, picture: Picture) -> float | None:
        y = picture.luma
        if min(y.shape) < 3:
            return None
        vertical = y[:-2] - 2 * y[1:-1] + y[2:]
        both = vertical[:, :-2] - 2 * vertical[:, 1:-1] + vertical[:, 2:]
        return math.sqrt(math.pi / 2) / 6 * float(np.abs(both).mean())
