"""Whether the tiny model has learned what `synthesis/novelties.py` draws, by pixels alone."""

from __future__ import annotations

import numpy as np

from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.colour_metrics import ground_colour, nearest_colour, text_colour
from qwen_image_fast.training.evaluation.edit_checks import KEPT, ink
from qwen_image_fast.training.synthesis.colours import COLOURS, TINY_GROUND_COLOURS, TINY_TEXT_COLOURS
from qwen_image_fast.training.synthesis.novelties import frame_mask, sign

SAME_SIGN = 0.7  # intersection over union; texts of the tiny model have at most 0.4 with the sign
FRAMED = 0.9  # share of the frame that has its colour
NEAR = 60.0  # distance in RGB of what counts as a colour, as in `edit_checks`


def is_sigil(image: np.ndarray, colour: str, ground: str) -> bool:
    """Whether a picture, uint8 [H, W, 3], shows the sign in a named colour on a named ground."""
    height, width = image.shape[:2]
    return (
        likeness(image) >= SAME_SIGN
        and ground_colour(image, TINY_GROUND_COLOURS) == ground
        and text_colour(image, (0, 0, width, height), TINY_TEXT_COLOURS) == colour
    )


def likeness(image: np.ndarray) -> float:
    """Intersection over union of what stands out in a picture and the sign."""
    made, wanted = ink(image), sign(image.shape[0]) >= 0.5
    return float((made & wanted).sum() / max((made | wanted).sum(), 1))


def is_framed(image: np.ndarray, before: np.ndarray, after: np.ndarray, colour: str) -> bool:
    """Whether `image` is `before` with a frame in a colour, as `after` is, and all else as it was."""
    mask = frame_mask(image.shape[0])
    inside = mask & (np.linalg.norm(after.astype(float) - COLOURS[colour].rgb, axis=2) < 1)
    distance = np.linalg.norm(image[inside].astype(float) - COLOURS[colour].rgb, axis=1)
    right = nearest_colour(np.median(image[inside], axis=0), TINY_TEXT_COLOURS) == colour
    kept = psnr_outside(image, before, mask) >= KEPT
    return bool((distance < NEAR).mean() >= FRAMED and right and kept)
