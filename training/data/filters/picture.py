"""A record under examination: decoded once, with what several filters share."""

from __future__ import annotations

import io
import threading
import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from qwen_image_fast.pictures import to_rgb

from ...evaluation.ocr import Line
from ..faults import sentence
from ..record import Record

if TYPE_CHECKING:
    from qwen_image_fast.ops import PictureStatistics

WORK_SIDE = 512
_ORIENTATION = 0x0112
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# What Python does with warnings is the process's: two threads that change it at once may leave it changed.
_one_at_a_time = threading.Lock()


class BrokenImage(ValueError):
    """A sentence about why a picture cannot be used."""


class Picture:
    """A record and its pixels.

    Args:
        record: what to examine.
        max_pixels: larger pictures are not decoded.

    Attributes:
        tags: what filters found out, for the record's metadata: `text_language`, for one.
        lines: of text, as `text.LanguageSplit` read them.
    """

    def __init__(self, record: Record, max_pixels: int = 100_000_000):
        self.record = record
        self.tags: dict[str, Any] = {}
        self.lines: list[Line] = []
        self._max_pixels = max_pixels

    @cached_property
    def rgb(self) -> np.ndarray:
        """uint8 [height, width, 3], upright, as the pipelines take a picture (`pictures.to_rgb`).

        Raises:
            BrokenImage: the file is empty, damaged, truncated, of no known type, animated or too large.
        """
        return self._decoded[0]

    @property
    def orientation(self) -> int:
        """The EXIF orientation of the file, 1 (stored upright) to 8; 1 where there is none."""
        return self._decoded[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, upright."""
        return self.rgb.shape[:2]

    @cached_property
    def work(self) -> np.ndarray:
        """`rgb` with its longer side reduced to 512 pixels, if it is longer: scores then mean the same at any size."""
        height, width = self.size
        if max(height, width) <= WORK_SIDE:
            return self.rgb
        scale = WORK_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(self.rgb).resize(size, Image.Resampling.BOX))

    @cached_property
    def statistics(self) -> PictureStatistics:
        """Of `work`."""
        from qwen_image_fast.ops import picture_statistics  # loads torch, which looking at files does without

        return picture_statistics(self.work)

    @cached_property
    def grey(self) -> np.ndarray:
        """float32 [height, width] of `rgb` at its full size, 0 to 255, as `luma`."""
        return self.rgb.astype(np.float32) @ _LUMA

    @property
    def luma(self) -> np.ndarray:
        """float32 [height, width] of `work`, 0 to 255: 0.299 R + 0.587 G + 0.114 B (BT.601)."""
        return self.statistics.luma

    @cached_property
    def _decoded(self) -> tuple[np.ndarray, int]:
        if self.record.fault:
            raise BrokenImage(self.record.fault)
        if not self.record.image:
            raise BrokenImage("the file is empty")
        try:
            with _one_at_a_time, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of its own, lower, limit
                with Image.open(io.BytesIO(self.record.image)) as image:
                    if image.width * image.height > self._max_pixels:
                        raise BrokenImage(f"it has {image.width} x {image.height} pixels, more than {self._max_pixels}")
                    # The further pictures of a camera's MPO are previews or the other eye's.
                    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                        raise BrokenImage(f"it is animated or has pages: {image.n_frames} of them")
                    orientation = int(image.getexif().get(_ORIENTATION, 1))
                    return np.asarray(to_rgb("it", image)), orientation
        except BrokenImage:
            raise
        except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
            raise BrokenImage(f"it cannot be decoded: {sentence(error)}") from error
