"""Reading text where it is known to stand: recognition alone, without looking for it, several times as fast."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.synthesis.sample import Box

_LEAST_HEIGHT = 48  # pixels to which a band is enlarged: the recogniser's own height


class BandReader:
    """Reads one line in each band of a picture, with RapidOCR's recogniser.

    Args:
        threads: of the inference engine.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed.
    """

    def __init__(self, threads: int = 1):
        with needed_for("reading text"):
            import onnxruntime  # noqa: F401  rapidocr imports it only when it reads
            from rapidocr import RapidOCR
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        engine = "EngineConfig.onnxruntime"
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.text_score": 0.0,
                f"{engine}.intra_op_num_threads": threads,
                f"{engine}.inter_op_num_threads": 1,
            }
        )

    def read(self, image: np.ndarray, bands: Sequence[Box]) -> list[str]:
        """What each band of a uint8 image [H, W, 3] says; empty where nothing can be read."""
        found = []
        for left, top, right, bottom in bands:
            part = image[top:bottom, left:right]
            factor = max(1, math.ceil(_LEAST_HEIGHT / max(1, part.shape[0])))
            size = part.shape[1] * factor, part.shape[0] * factor
            large = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BICUBIC))
            read = self._engine(large[:, :, ::-1], use_det=False, use_cls=False, use_rec=True)
            found.append("".join(read.txts or ()).strip())
        return found


def bands(boxes: Sequence[Box], size: tuple[int, int]) -> list[Box]:
    """Of boxes of texts in a picture of (height, width): a third of their height more above and below, and as wide as
    the picture, so that what stands beside a text is read with it, unless another text stands beside it."""
    height, width = size
    found = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        more = math.ceil((bottom - top) / 3)
        upper, lower = max(0, top - more), min(height, bottom + more)
        others = [box for k, box in enumerate(boxes) if k != number]
        upper = max([upper, *(box[3] for box in others if upper < box[3] <= top)])
        lower = min([lower, *(box[1] for box in others if bottom <= box[1] < lower)])
        beside = [box for box in others if box[1] < bottom and top < box[3]]
        start = max([0, *((box[2] + left) // 2 for box in beside if box[2] <= left)])
        end = min([width, *((right + box[0]) // 2 for box in beside if right <= box[0])])
        found.append((start, upper, end, lower))
    return found
