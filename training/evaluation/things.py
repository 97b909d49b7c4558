"""Which shapes of which colours a picture shows and where, by pixels alone: for filled shapes on a plain ground.

Components of what stands out from the ground; the shape is the template with the best intersection over union, the
colour the nearest named one. Exact on renderings, and on renderings that went through the tiny model's VAE.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwen_image_fast.training.evaluation.colour_metrics import Box, ground_colour, text_colour
from qwen_image_fast.training.evaluation.edit_checks import ink
from qwen_image_fast.training.synthesis.canvas import SHAPES, shape_mask
from qwen_image_fast.training.synthesis.colours import TINY_GROUND_COLOURS, TINY_TEXT_COLOURS
from qwen_image_fast.training.synthesis.sample import article

LEAST_PIXELS = 40  # smaller spots are no things
_SIDE = 32
_ALIKE = 0.8  # intersection over union with a template; two different shapes have at most 0.79
_LONGEST = 1.35  # longer side of a shape over its shorter one


@dataclass(frozen=True)
class Thing:
    """Something in a picture. shape: None where it is none of `SHAPES`; box: left, top, right, bottom in pixels."""

    shape: str | None
    colour: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape or 'something'}"


def things(image: np.ndarray) -> list[Thing]:
    """What a picture, uint8 [H, W, 3], shows, from left to right."""
    return sorted((Thing(_shape(mask), colour, box) for mask, colour, box in _parts(image)), key=lambda t: t.centre)


def likeness(image: np.ndarray, wanted: Sequence[tuple[str, str]]) -> float:
    """From 0 to 1, how much a picture's things are like those that are wanted, (shape, colour) each, wherever they are.

    The best intersection over union of a thing of its colour with each wanted template, a thing counting once, over the
    number of things, wanted or shown, whichever is larger. Where `fault` says yes or no, this says how near it was.
    """
    shown = list(_parts(image))
    many, total = max(len(shown), len(wanted)), 0.0
    for shape, colour in wanted:
        fits = [_overlap(mask, shape) if seen == colour else 0.0 for mask, seen, _ in shown]
        if fits:
            best = int(np.argmax(fits))
            total += fits[best]
            del shown[best]
    return total / many


def components(mask: np.ndarray, least: int = LEAST_PIXELS) -> list[np.ndarray]:
    """The parts of a mask that hang together by sides or corners and have at least so many pixels."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        waiting = [left.pop()]
        part = np.zeros_like(mask)
        while waiting:
            y, x = waiting.pop()
            part[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            waiting += near
        if part.sum() >= least:
            found.append(part)
    return found


def fault(image: np.ndarray, wanted: Sequence[tuple[str, str]], ground: str, relation: str | None = None) -> str | None:
    """What is wrong with a picture that must show so many (shape, colour) on a ground and nothing else; None: nothing.

    relation: `left of`, `right of`, `above` or `below`: where the first stands to the second.
    """
    seen = things(image)
    if sorted((t.shape or "", t.colour) for t in seen) != sorted(wanted):
        return f"shows {', '.join(f'{article(t.name)} {t.name}' for t in seen) or 'nothing'}"
    if (name := ground_colour(image, TINY_GROUND_COLOURS)) != ground:
        return f"the ground is {name}"
    if relation:
        first, second = (next(t for t in seen if (t.shape, t.colour) == one) for one in wanted[:2])
        if not stands(first, second, relation):
            return f"the {first.name} is not {relation} the {second.name}"
    return None


def stands(first: Thing, second: Thing, relation: str) -> bool:
    """GenEval's rule: of the way from the second's centre to the first's, less a tenth of both sizes along each axis,
    the direction asked for must have more than half of the length."""
    way = np.array(first.centre) - np.array(second.centre)
    sizes = [t.box[2 + axis] - t.box[axis] for axis in (0, 1) for t in (first, second)]
    slack = 0.1 * np.array([sizes[0] + sizes[1], sizes[2] + sizes[3]])
    way = np.sign(way) * np.maximum(np.abs(way) - slack, 0.0)
    length = float(np.linalg.norm(way))
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return length > 0 and sign * way[axis] / length > 0.5


def _ground(image: np.ndarray) -> np.ndarray:
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.median(edge, axis=0).astype(np.uint8)


def _parts(image: np.ndarray) -> Iterator[tuple[np.ndarray, str, Box]]:
    """Of each thing its mask, cut to its box, the name of its colour and the box."""
    for mask in components(ink(image)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        colour = text_colour(np.where(mask[..., None], image, _ground(image)), box, TINY_TEXT_COLOURS)
        yield mask[box[1] : box[3], box[0] : box[2]], colour or "faint", box


def _shape(mask: np.ndarray) -> str | None:
    overlap = {name: _overlap(mask, name) for name in SHAPES}
    best = max(overlap, key=lambda name: overlap[name])
    return best if overlap[best] >= _ALIKE else None


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Intersection over union with a shape's template; 0 for what is too long to be one."""
    if max(mask.shape) > _LONGEST * min(mask.shape):
        return 0.0
    made, template = _normal(mask), _templates()[shape]
    return float((made & template).sum() / (made | template).sum())


@functools.cache
def _templates() -> dict[str, np.ndarray]:
    found = {}
    for name in SHAPES:
        mask = np.asarray(shape_mask(name, 64)) >= 128
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found[name] = _normal(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return found


def _normal(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(image) >= 128
