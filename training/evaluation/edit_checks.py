"""Whether an edit was done, by pixels alone: for pictures on plain grounds, as `shapes` and `pure` draw them.

What a text says is read by OCR; that a colour changed, that a thing came, went or moved is not, and must be seen in the
picture. A pair knows its target exactly, so the picture is compared with it where the pair's mask says it changes. What
is added may stand anywhere in the place that the instruction names, a shape in another size (`as_placed`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from qwen_image_fast.training.evaluation.cases import psnr_outside
from qwen_image_fast.training.evaluation.colour_metrics import Box, ground_colour, text_colour
from qwen_image_fast.training.synthesis.colours import COLOURS, TINY_GROUND_COLOURS, TINY_TEXT_COLOURS
from qwen_image_fast.training.synthesis.sample import EditSample

PLAIN = ("shapes", "pure")  # strategies whose pictures can be checked
INK = 60.0  # distance from the ground in RGB of what stands out
KEPT = 28.0  # dB: what an edit must not touch, and a reconstruction, is still itself
LEFT_OVER = 0.05  # share of a removed thing that may be left
SIZES = 0.6, 1.6  # of an added shape, in the target's


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


def must_be_read(pair: EditSample) -> bool:
    """Whether the edit is done only if the texts can be read too: where one was changed, added or moved, or the ground
    was. Strokes near enough to be seen in their place may be those of other letters."""
    comes = pair.kind == "add" and pair.target_lines != pair.source_lines
    return bool(pair.target_lines) and (pair.kind in ("text", "ground", "move") or comes)


def as_placed(pair: EditSample, image: np.ndarray) -> EditSample:
    """A pair of the kind add with the new thing where the picture, uint8 [H, W, 3], has one; other pairs as they are.

    `add a red circle at the top` says neither how large it is nor where at the top. The thing is moved within the named
    row and column, of 3/8, 2/8 and 3/8 of a side, and a shape is scaled, from 0.6 to 1.6. Where the picture has nothing
    new there, or something far from it in size, the pair stays as it is.
    """
    if pair.kind != "add" or pair.strategy not in PLAIN:
        return pair
    old, area = grown(ink(pair.source), 2), _box(pair.mask)
    wanted, made = (_extent(ink(picture) & ~old) for picture in (pair.target, image))
    if wanted is None or made is None:
        return pair
    sizes = [(box[2] - box[0], box[3] - box[1]) for box in (wanted, made)]
    scales = [there / one for one, there in zip(*sizes)]
    text = len(pair.target_lines) > len(pair.source_lines)
    if not text and not (SIZES[0] <= min(scales) and max(scales) <= min(SIZES[1], 1.2 * min(scales))):
        return pair
    scale = 1.0 if text else sum(scales) / 2
    thing = pair.target[area[1] : area[3], area[0] : area[2]]
    best, most = pair, 0.0
    for more, across, down in itertools.product((0,) if text else (0, -1, 1), (0, -1, 1), (0, -1, 1)):
        width, height = (round(scale * side) + more for side in thing.shape[1::-1])
        left, top = (
            round((made[i] + made[i + 2] + scale * (area[i] + area[i + 2] - wanted[i] - wanted[i + 2]) - extent) / 2)
            for i, extent in enumerate((width, height))
        )
        box = left + across, top + down, left + across + width, top + down + height
        if not _same_place(box, area, pair.mask.shape):
            continue
        placed = _placed(pair, thing, area, box)
        shown, there = ink(image) & placed.mask, ink(placed.target) & placed.mask
        like = float((shown & there).sum() / max(1, (shown | there).sum()))
        if like > most:
            best, most = placed, like
    return best


def _placed(pair: EditSample, thing: np.ndarray, area: Box, box: Box) -> EditSample:
    left, top, right, bottom = box
    resized = Image.fromarray(thing).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    target, mask = pair.source.copy(), np.zeros_like(pair.mask)
    target[top:bottom, left:right] = np.asarray(resized)
    mask[top:bottom, left:right] = True
    return replace(pair, target=target, mask=mask, boxes=tuple(box if one == area else one for one in pair.boxes))


def _same_place(one: Box, other: Box, shape: tuple[int, ...]) -> bool:
    """Whether a box lies in the picture and its middle in the row and the column of the other's."""
    height, width = shape
    return min(one) >= 0 and all(
        one[i + 2] <= side and _third(one[i] + one[i + 2], side) == _third(other[i] + other[i + 2], side)
        for i, side in enumerate((width, height))
    )


def _extent(mask: np.ndarray) -> Box | None:
    """The box of what is more than a spot; None: nothing is."""
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if not len(rows) or not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _third(twice: int, side: int) -> int:
    """Of a coordinate, given twice: 0, 1 or 2."""
    return (twice * 4 >= 3 * side) + (twice * 4 >= 5 * side)


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
