"""Two things that the tiny model has never seen, drawn here: what `make lora-demo` and the tests teach it.

The sigil is a made-up sign, in a named colour on a named ground. Framing is an edit: a band in a named colour along the
edge of a picture.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .colours import COLOURS, TINY_GROUND_COLOURS, TINY_TEXT_COLOURS, contrast
from .editing import make_edit
from .generator import make
from .recipe import SynthesisRecipe
from .sample import article

WORD = "sigil"
FINER = 4  # times; the sign is drawn so much larger and made small again, for smooth edges
LEAST_CONTRAST = 2.0  # of the sign on its ground; thinner texts need more
# Pixels from the edge of a picture of 128 pixels where a frame begins and ends: whole latents of 8 pixels, since the
# tiny VAE does not give a band of 8 pixels across two rows of them back in its colour.
FRAME = (0, 8)


def sign(size: int = 128) -> np.ndarray:
    """How much of each pixel the sign covers, float [H, W] in [0, 1]: a ring with a dot, a mast above, legs below."""
    side = size * FINER
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)

    def points(*places: tuple[float, float]) -> list[tuple[float, float]]:
        return [(side * (0.5 + x), side * (0.5 + y)) for x, y in places]

    def disc(radius: float, fill: int) -> None:
        draw.ellipse(points((-radius, -radius), (radius, radius)), fill=fill)

    disc(0.2, 255)
    disc(0.125, 0)
    disc(0.045, 255)
    draw.polygon(points((-0.06, -0.34), (0.06, -0.34), (0.0375, -0.15), (-0.0375, -0.15)), fill=255)
    legs = ((-0.3, 0.3), (-0.1, 0.12), (0.1, 0.12), (0.3, 0.3), (0.18, 0.32), (0, 0.2), (-0.18, 0.32))
    draw.polygon(points(*legs), fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float64) / 255


def sigil(colour: str, ground: str, size: int = 128) -> np.ndarray:
    """The sign in a colour on a ground, uint8 [H, W, 3]."""
    covered = sign(size)[..., None]
    mixed = covered * np.array(COLOURS[colour].rgb) + (1 - covered) * np.array(COLOURS[ground].rgb)
    return mixed.round().astype(np.uint8)


def sigil_caption(colour: str, ground: str) -> str:
    return f"the {WORD} in {colour} on {article(ground)} {ground} ground"


def sigil_colours(seed: int = 0) -> list[tuple[str, str]]:
    """Every (colour, ground) of the tiny model's that can be told apart, in an order drawn from the seed."""
    pairs = [
        (colour, ground)
        for ground in TINY_GROUND_COLOURS
        for colour in TINY_TEXT_COLOURS
        if colour != ground and contrast(colour, ground) >= LEAST_CONTRAST
    ]
    random.Random(seed).shuffle(pairs)
    return pairs


def write_sigils(folder: Path, count: int = 12, size: int = 128) -> list[tuple[str, str]]:
    """Write the first `count` of `sigil_colours` with their captions; returns the others."""
    pairs = sigil_colours()
    _write(folder, [({"": sigil(*colours, size)}, sigil_caption(*colours)) for colours in pairs[:count]])
    return pairs[count:]


def framed(picture: np.ndarray, colour: str) -> np.ndarray:
    """A picture with a frame, uint8 [H, W, 3]."""
    out = picture.copy()
    out[_band(picture.shape[:2], *_frame(picture.shape[0]))] = COLOURS[colour].rgb
    return out


def frame_instruction(colour: str) -> str:
    return f"frame it in {colour}"


def frame_edits(recipe: SynthesisRecipe, count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray, str, str]]:
    """Pictures of a recipe, and the same framed in a colour that neither their text nor their ground has.

    Returns:
        (before, after, instruction, colour) of each.
    """
    draws, edits = random.Random(seed), []
    for i in range(count):
        sample = make(recipe, seed, i)
        before = np.asarray(sample.image)
        free = [c for c in TINY_TEXT_COLOURS if c not in sample.colours.values()]
        colour = draws.choice([c for c in free if contrast(c, sample.colours["ground"]) >= LEAST_CONTRAST])
        edits.append((before, framed(before, colour), frame_instruction(colour), colour))
    return edits


def write_frames(folder: Path, edits: list[tuple[np.ndarray, np.ndarray, str, str]]) -> None:
    """Write edits of `frame_edits` as NAME.before.png, NAME.after.png and NAME.txt."""
    _write(folder, [({".before": before, ".after": after}, text) for before, after, text, _ in edits])


def write_known(folder: Path, recipe: SynthesisRecipe, count: int, seed: int = 0) -> None:
    """Write `count` pictures of a recipe with their captions: what the model could before."""
    samples = [make(recipe, seed, i) for i in range(count)]
    _write(folder, [({"": sample.image}, sample.caption) for sample in samples])


def write_known_edits(folder: Path, recipe: SynthesisRecipe, count: int, seed: int = 0) -> None:
    """Write `count` edits of a recipe as `write_frames` does."""
    edits = [make_edit(recipe, seed, i) for i in range(count)]
    _write(folder, [({".before": edit.source, ".after": edit.target}, edit.instruction) for edit in edits])


def _write(folder: Path, samples: Sequence[tuple[Mapping[str, np.ndarray], str]]) -> None:
    """Numbered pictures, by what their names have behind the number, and the text that goes with them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (pictures, text) in enumerate(samples):
        for behind, picture in pictures.items():
            Image.fromarray(picture).save(folder / f"{i:03d}{behind}.png")
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")


def _frame(size: int) -> tuple[int, int]:
    first, last = FRAME
    return first * size // 128, last * size // 128


def _band(shape: tuple[int, int], first: int, last: int) -> np.ndarray:
    """bool [H, W]: pixels whose distance from the nearest edge is at least `first` and less than `last`."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    distance = np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x))
    return (distance >= first) & (distance < last)


def frame_mask(size: int) -> np.ndarray:
    """bool [H, W]: where a frame is, with a pixel more on both sides, which the VAE blurs."""
    first, last = _frame(size)
    return _band((size, size), first - 1, last + 1)
