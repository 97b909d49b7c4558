"""The fixed prompts of TinyEval: what is asked for, what must be seen, and one right picture of it.

They are a function of nothing but this file and the synthesis of texts and edits; a test holds a hash of all of them.
Words are held out from training. Shapes and colours cannot be: there are 116 pairs of them on a ground, which every
run sees. What is new there is what two of them, numbers and places are put together to.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_image_fast.training.evaluation.cases import held_out_edits
from qwen_image_fast.training.synthesis.canvas import SHAPES, Ground, Scene, ShapeElement, render_scene
from qwen_image_fast.training.synthesis.colours import TINY_GROUND_COLOURS, TINY_TEXT_COLOURS, readable_on
from qwen_image_fast.training.synthesis.generator import generator_of, make
from qwen_image_fast.training.synthesis.recipe import EDITS, SynthesisRecipe, tiny
from qwen_image_fast.training.synthesis.sample import EditSample, article

SIDE = 128
PICTURES = ("single", "two", "counting", "position", "text")
RELATIONS = ("left of", "right of", "above", "below")
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_SEED = 2026


@dataclass(frozen=True)
class Asked:
    """A prompt for a picture and what it must show.

    Attributes:
        task: of `PICTURES`. prompt: in English. right: a right picture, uint8 [128, 128, 3].
        ground: a colour. things: (shape, colour) of each shape. relation: of the first to the second, or None.
        text, colour, box: of the text, where it stands in `right`; empty where there is none.
    """

    task: str
    prompt: str
    right: np.ndarray
    ground: str
    things: tuple[tuple[str, str], ...] = ()
    relation: str | None = None
    text: str = ""
    colour: str = ""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


def recipe(*edits: str) -> SynthesisRecipe:
    """Of the texts and of one kind of edit: one text of 2 to 6 held-out letters, in edits at times beside a shape."""
    return tiny(SIDE, max_lines=1, max_letters=6, split="held_out", edits=edits or EDITS)


def pictures(task: str, count: int) -> list[Asked]:
    """The first `count` prompts of a task, all different."""
    found: dict[str, Asked] = {}
    index = 0
    while len(found) < count:
        asked = _text(index) if task == "text" else _shapes(task, index)
        found.setdefault(asked.prompt, asked)
        index += 1
        if index > 50 * count:
            raise ValueError(f"evaluate tiny: count must be at most {len(found)} for {task}, got {count}")
    return list(found.values())


def edits(kind: str, count: int) -> list[EditSample]:
    """The first `count` edits of a kind."""
    return held_out_edits(recipe(kind), count, kind, seed=_SEED)


def digest(asked: Sequence[Asked], pairs: Sequence[EditSample]) -> str:
    """A hash of all prompts and instructions: results of different sets must not be compared."""
    told = [[a.task, a.prompt] for a in asked] + [[p.kind, p.instruction] for p in pairs]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _text(index: int) -> Asked:
    sample = make(recipe(), _SEED, index)
    colours = sample.colours
    return Asked(
        "text", sample.caption, sample.image, colours["ground"], text=sample.lines[0], colour=colours["text"],
        box=sample.boxes[0],
    )  # fmt: skip


def _shapes(task: str, index: int) -> Asked:
    rng = generator_of(_SEED, index + 1_000_000 * (1 + PICTURES.index(task)))
    ground = rng.choice(TINY_GROUND_COLOURS)
    colours = [c for c in readable_on(ground, TINY_TEXT_COLOURS) if c != ground]
    kinds, relation = rng.sample(list(SHAPES), 2), None
    if task in ("two", "position") and len(colours) < 2:
        return _shapes(task, index + 500_000)
    if task == "counting":
        number = rng.choice(list(_NUMBERS))
        wanted = [(kinds[0], rng.choice(colours))] * number
        told = f"{_NUMBERS[number]} {wanted[0][1]} {kinds[0]}s"
    else:
        wanted = list(zip(kinds, rng.sample(colours, min(2, len(colours)))))[: 1 if task == "single" else 2]
        names = [f"{article(colour)} {colour} {shape}" for shape, colour in wanted]
        relation = rng.choice(RELATIONS) if task == "position" else None
        told = (f" {relation} " if relation else " and ").join(names)
    prompt = f"{told} on {article(ground)} {ground} ground"
    scene = Scene((SIDE, SIDE), Ground(ground), tuple(_placed(rng, wanted, relation)))
    return Asked(task, prompt, render_scene(scene), ground, tuple(wanted), relation)


def _placed(rng: random.Random, wanted: Sequence[tuple[str, str]], relation: str | None) -> list[ShapeElement]:
    """One shape in the middle, two beside or above each other, three and four in the quarters."""
    half = SIDE // 2
    if len(wanted) == 1:
        cells = [(half, half)]
    elif len(wanted) == 2:
        cells = [(SIDE // 4, half), (3 * SIDE // 4, half)]
        if relation in ("above", "below"):
            cells = [(y, x) for x, y in cells]
        if relation in ("right of", "below"):
            cells.reverse()
    else:
        cells = [(x, y) for y in (SIDE // 4, 3 * SIDE // 4) for x in (SIDE // 4, 3 * SIDE // 4)]
    largest = 90 if len(wanted) == 1 else 56
    return [
        ShapeElement(shape, colour, x, y, rng.randint(round(0.6 * largest), largest))
        for (shape, colour), (x, y) in zip(wanted, cells)
    ]
