"""Reading the text in a picture, with RapidOCR, whose wheel carries its models."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.synthesis.sample import reading_order

# A picture is enlarged by a whole factor until its shorter side has so many pixels: the detector was made for pages.
_LEAST_SIDE = 256


@dataclass(frozen=True)
class Line:
    """A line of text: what it says, its (left, top, right, bottom) in pixels, and the reader's confidence in [0, 1]."""

    text: str
    box: tuple[int, int, int, int]
    score: float


class Reader:
    """Finds and reads lines of English and Chinese.

    Args:
        threads: of the inference engine. side: pixels to which the shorter side is enlarged before text is looked for;
            0: what the detector was made with, 736. turned: whether lines that stand upside down are looked for.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed.
    """

    def __init__(self, threads: int = 1, side: int = 0, turned: bool = True):
        with needed_for("reading text"):
            import onnxruntime  # noqa: F401  rapidocr imports it only when it reads
            from rapidocr import RapidOCR
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of every picture without text
        engine = "EngineConfig.onnxruntime"
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                f"{engine}.intra_op_num_threads": threads,
                f"{engine}.inter_op_num_threads": 1,
                "Global.use_cls": turned,
                **({"Det.limit_side_len": side} if side else {}),
            }
        )

    def read(self, image: np.ndarray) -> list[Line]:
        """The lines of a uint8 image of height x width x 3, from top to bottom, then from left to right."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"ocr: image must be uint8 [height, width, 3], got {image.dtype} {image.shape}")
        factor = max(1, math.ceil(_LEAST_SIDE / min(image.shape[:2])))
        size = image.shape[1] * factor, image.shape[0] * factor
        large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        found = self._engine(large[:, :, ::-1])  # it takes BGR
        lines = []
        for text, corners, score in zip(found.txts or (), _corners(found.boxes), found.scores or ()):
            (left, top), (right, bottom) = corners.min(0) / factor, corners.max(0) / factor
            box = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
            lines.append(Line(text.strip(), box, float(score)))
        return [lines[i] for i in reading_order([line.box for line in lines])]


def _corners(boxes: np.ndarray | None) -> np.ndarray:
    return np.zeros((0, 4, 2)) if boxes is None else np.asarray(boxes)
