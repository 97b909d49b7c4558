"""Stage 2, quality: numbers of the pixels, on a picture of at most 512 pixels (`Picture.work`)."""

from __future__ import annotations

import math

import numpy as np

from .base import Filter, Measure, Verdict
from .picture import Picture


class Rotation(Filter):
    """Rejects pictures that EXIF says to turn, as the report does: captions were often written of the pixels as stored.

    Everything here, training too, sees them upright; to keep them, name this filter in `without`. Score: the EXIF
    orientation, 1 to 8.
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
        found = picture.statistics
        if found.laplacian is None or found.gradient is None or found.gradient < 1e-3:
            return None
        return found.laplacian / found.gradient


class Luma(Measure):
    """Mean of Y / 255."""

    name, stage = "luma", 2
    too_low, too_high = "the picture is too dark", "the picture is too bright"

    def score(self, picture: Picture) -> float:
        found = picture.statistics
        return found.luma_sum / found.luma.size / 255


class Saturation(Measure):
    """Mean saturation of HSV: (max - min) / max of a pixel's three colours, 0 for black."""

    name, stage = "saturation", 2
    too_high = "the colours are unnaturally strong"

    def score(self, picture: Picture) -> float:
        found = picture.statistics
        return found.saturation_sum / found.luma.size


class RgbEntropy(Measure):
    """Shannon entropy in bits of the histogram of 256 values, mean of the three colours: low for plain areas."""

    name, stage = "rgb_entropy", 2
    too_low = "large areas are plain"

    def score(self, picture: Picture) -> float:
        found = picture.statistics
        shares = found.histogram / found.luma.size
        return float(-(shares * np.log2(np.where(shares > 0, shares, 1))).sum()) / 3


class Texture(Measure):
    """Deviation of noise by Immerkaer (CVIU 1996): sqrt(pi / 2) / 6 mean |Y * [[1, -2, 1], [-2, 4, -2], [1, -2, 1]]|.

    High for noise and for textures too fine to learn.
    """

    name, stage = "texture", 2
    too_high = "the picture is noisy or its texture too fine"

    def score(self, picture: Picture) -> float | None:
        noise = picture.statistics.noise
        return None if noise is None else math.sqrt(math.pi / 2) / 6 * noise
