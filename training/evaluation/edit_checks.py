"""Whether an edit was done, by pixels alone: for pictures on plain grounds, as `shapes` and `pure` draw them.

What a text says is read by OCR; that a colour changed, that a thing came, went or moved is not, and must be seen in the
picture. A pair knows its target exactly, so the picture is compared with it where the pair's mask says it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.colour_metrics import Box, ground_colour, text_colour
from qwen_image_fast.training.synthesis.colours import COLOURS, TINY_GROUND_COLOURS, TINY_TEXT_COLOURS
from qwen_image_fast.training.synthesis.sample import EditSample

PLAIN = ("shapes", "pure")  # strategies whose pictures can be checked
INK = 60.0  # distance from the ground in RGB of what stands out
KEPT = 28.0  # dB: what an edit must not touch, and a reconstruction, is still itself
LEFT_OVER = 0.05  # share of a removed thing that may be left


def seen_done(pair: EditSample, image: np.ndarray) -> bool | None:
    """Whether the picture, uint8 [H, W, 3], shows what the pair's target shows; None where pixels cannot tell.

    colour, add, move: the same shape or strokes of the same named colour in the same place. remove: nothing is left.
    ground: the named colour of the ground, and the same things on it. reconstruct: at least 28 dB. text: None.
    """
    if pair.kind == "text" or pair.strategy not in PLAIN:
        return None
    if pair.kind == "reconstruct":
        return psnr_outside(image, pair.target, np.zeros(pair.mask.shape, bool)) >= KEPT
    if pair.kind == "remove":
        return bool((ink(image) & pair.mask).sum() <= LEFT_OVER * (ink(pair.source) & pair.mask).sum())
    if not alike(ink(image) & pair.mask, ink(pair.target) & pair.mask):
        return False
    if pair.kind == "ground":
        return _same_colour(
            lambda picture, names: ground_colour(picture, names), image, pair.target, TINY_GROUND_COLOURS
        )
    box = _box(ink(pair.target) & pair.mask)
    return _same_colour(lambda picture, names: text_colour(picture, box, names), image, pair.target, TINY_TEXT_COLOURS)


def ink(image: np.ndarray) -> np.ndarray:
    """bool [H, W]: what is farther than 60 from the ground, the median of the picture's edge."""
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.linalg.norm(image.astype(np.float64) - np.median(edge, axis=0), axis=2) > INK


def alike(made: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether two masks show the same thing in the same place.

    Solid things by the intersection over the union, at least 0.85: a circle in place of a square has 0.79. Strokes, of
    which little is left when a pixel is taken off all around, by how much of each lies within a pixel of the other, at
    least 0.8 both ways.
    """
    if not wanted.any() or not made.any():
        return not wanted.any() and not made.any()
    if (~grown(~wanted, 2)).sum() >= 0.3 * wanted.sum():
        return bool((made & wanted).sum() >= 0.85 * (made | wanted).sum())
    return bool(
        (made & grown(wanted, 1)).sum() >= 0.8 * made.sum() and (wanted & grown(made, 1)).sum() >= 0.8 * wanted.sum()
    )


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask with all within so many pixels of it, in any direction."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        height, width = mask.shape
        mask = np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
    return mask


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _same_colour(
    named: Callable[[np.ndarray, Sequence[str]], str | None], made: np.ndarray, wanted: np.ndarray, few: Sequence[str]
) -> bool:
    """By the few names of the tiny world where the wanted one is of them: neighbours such as beige are not meant."""
    name = named(wanted, tuple(COLOURS))
    return named(made, few) == name if name in few else named(made, tuple(COLOURS)) == name
