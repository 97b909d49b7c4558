"""Stage 5, refinement: enough pixels, no blocks of compression, pleasing, without codes and borders."""

from __future__ import annotations

import numpy as np

from qwen_image_fast.extras import needed_for

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
        with needed_for("the filter codes", "add codes to the recipe's `without`"):
            import cv2
        self._qr, self._bars = cv2.QRCodeDetector(), cv2.barcode.BarcodeDetector()

    def judge(self, picture: Picture) -> Verdict:
        grey = picture.grey.astype(np.uint8)  # reduced, a small code can no longer be read
        # Photographs have corners that look like a QR code's: only one that can be read counts.
        if self._qr.detectAndDecode(grey)[0]:
            return Verdict(1.0, "the picture has a QR code")
        if self._bars.detectAndDecode(grey)[0]:
            return Verdict(1.0, "the picture has a bar code")
        return Verdict(0.0)


class Watermark(Measure):
    """How far a pattern that repeats over the whole picture stands out: of tiled watermarks, not of single ones.

    The Laplacian of Y is divided by its root mean square over 17 x 17 pixels, plus 2, so that faint marks on plain
    ground count as much as the picture's own edges. Of that, the inverse transform of |F|, where a correlation has
    |F|^2: dividing by |F| once, half way to phase correlation, takes the lines out that a picture has at any scale.
    Score: its largest value at shifts of 24 pixels or more up to half of the picture, over the root mean square at all
    of them. None for pictures of less than 96 pixels.
    """

    name, stage = "watermark", 5
    too_high = "a mark repeats over the picture"

    def score(self, picture: Picture) -> float | None:
        y = picture.luma
        if min(y.shape) < 96:
            return None
        laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
        even = laplacian / (np.sqrt(_local_mean(np.square(laplacian), 17)) + 2)
        even -= even.mean()
        height, width = even.shape
        # Zeros up to twice the size keep the ends of the picture from meeting.
        amplitude = np.abs(np.fft.rfft2(even, (2 * height, 2 * width)))
        down, across = height // 2, width // 2
        found = np.fft.irfft2(amplitude, (2 * height, 2 * width))
        # Half of the plane: the value at the opposite shift is the same.
        found = np.concatenate([found[-down:, :across], found[:down, :across]])
        rows, columns = np.abs(np.arange(-down, down)), np.arange(across)
        found /= np.outer(height - rows, width - columns)
        far = found[(rows[:, None] >= 24) | (columns >= 24)]
        deviation = float(np.sqrt(np.square(far).mean()))
        return float(far.max()) / deviation if deviation > 0 else None


def _local_mean(values: np.ndarray, side: int) -> np.ndarray:
    """Means of side x side windows around each value, from sums of all values above and to the left."""
    sums = np.pad(values, side // 2, mode="reflect").astype(np.float64).cumsum(0).cumsum(1)
    sums = np.pad(sums, ((1, 0), (1, 0)))
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return np.maximum(windows, 0) / side**2


class AbnormalElement(Filter):
    """Rejects pictures in which the captioner (`data annotate`) saw watermarks or abnormal elements; score: 1 if so.

    None for records that were not annotated.
    """

    name, stage = "abnormal_element", 5

    def judge(self, picture: Picture) -> Verdict:
        seen = picture.record.metadata.get("annotation")
        if not isinstance(seen, dict):
            return Verdict(None)
        if seen.get("watermarks"):
            return Verdict(1.0, f"the captioner saw a watermark: {seen['watermarks']!r:.80}")
        if seen.get("abnormal_element"):
            return Verdict(1.0, "the captioner saw a code, a mosaic, a blur or a border")
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
