"""Stage 5, refinement: enough pixels, no blocks of compression, pleasing, without codes and borders."""

from __future__ import annotations

import numpy as np

from .base import Filter, Measure, Verdict
from .captions import Scorer
from .curation import Resolution
from .picture import Picture


class RefinedResolution(Resolution):
    """Pixels of the shorter side, for the stage of 640 px."""

    name, stage = "refined_resolution", 5


class ImageQuality(Measure):
    """Blockiness: mean |step| across a line, median of the lines between JPEG's 8 x 8 blocks over that of the others.

    About 1 without blocks; the mean of both directions. The median keeps an edge that happens to lie on the grid from
    counting. Measured on the pixels as stored, whose grid it is; after Wang, Sheikh and Bovik (ICIP 2002).
    """

    name, stage = "image_quality", 5
    too_high = "the picture shows blocks of compression"

    def score(self, picture: Picture) -> float | None:
        if min(picture.size) < 32:
            return None
        grey = picture.grey
        ratios = []
        for pixels in (grey, grey.T):
            steps = np.abs(np.diff(pixels, axis=1)).mean(0)
            steps = steps[: len(steps) // 8 * 8].reshape(-1, 8)
            ratios.append((np.median(steps[:, 7]) + 0.1) / (np.median(steps[:, :7]) + 0.1))
        return float(np.mean(ratios))


class Aesthetic(Measure):
    """A model's opinion of the picture.

    Args:
        low: smallest score.
        scorer: of a picture and a text; it is given "".
    """

    name, stage = "aesthetic", 5
    too_low = "the picture is not pleasing"

    def __init__(self, low: float, scorer: Scorer):
        super().__init__(low)
        self._scorer = scorer

    def score(self, picture: Picture) -> float:
        return self._scorer(picture.work, "")


class Codes(Filter):
    """Rejects pictures in which OpenCV finds and reads a QR code or finds a bar code; score: 1 if so, else 0.

    Raises:
        ImportError: opencv-python-headless is not installed.
    """

    name, stage = "codes", 5

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise ImportError(
                "the filter codes needs OpenCV: pip install 'qwen-image-fast[data]', or add codes to the recipe's "
                "`without`"
            ) from error
        self._qr, self._bars = cv2.QRCodeDetector(), cv2.barcode.BarcodeDetector()

    def judge(self, picture: Picture) -> Verdict:
        grey = picture.grey.astype(np.uint8)  # reduced, a small code can no longer be read
        # Photographs have corners that look like a QR code's: only one that can be read counts.
        if self._qr.detectAndDecode(grey)[0]:
            return Verdict(1.0, "the picture has a QR code")
        if self._bars.detectAndDecode(grey)[0]:
            return Verdict(1.0, "the picture has a bar code")
        return Verdict(0.0)


class Border(Measure):
    """Share of the picture's shorter side that plain bars on two opposite sides take together, the larger pair.

    A line belongs to a bar while its pixels and those of the outermost line differ by less than 3 of 255 on average.
    """

    name, stage = "border", 5
    too_high = "the picture has a border"

    def score(self, picture: Picture) -> float:
        shares = []
        for pixels in (picture.luma, picture.luma.T):
            both = [_bar(pixels), _bar(pixels[::-1])]
            # A plain ground reaches inwards on one side only, or fills the picture; a border has two bars.
            shares.append(2 * min(both) / min(pixels.shape) if max(both) < len(pixels) else 0.0)
        return max(shares)


def _bar(pixels: np.ndarray) -> int:
    """Lines from the top that are as plain as, and of the grey of, the first."""
    same = np.abs(pixels - np.median(pixels[0])).mean(1) < 3
    return len(same) if same.all() else int(np.argmin(same))
