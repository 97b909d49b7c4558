"""Plain coloured shapes with captions, for the stage of a curriculum that comes before text."""

from __future__ import annotations

import random

from .canvas import SHAPES, Ground, Scene, ShapeElement, element_box, render_scene
from .colours import COLOURS, readable_on
from .recipe import SynthesisRecipe
from .sample import Sample, article

NUMBERS = {2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四")}
SIDES = {"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"}


def plan(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Scene:
    """One or two shapes of different kind and colour."""
    width, height = size
    ground = Ground(rng.choice(recipe.ground_colours))
    colours = [c for c in readable_on(ground.colour, recipe.text_colours) if c != ground.colour]
    count = 2 if rng.random() < 0.4 and len(colours) > 1 else 1
    elements = []
    for number, (kind, colour) in enumerate(zip(rng.sample(list(SHAPES), count), rng.sample(colours, count))):
        room = min(width // count, height)
        extent = max(6, round(room * rng.uniform(0.4, 0.85)))
        free_x, free_y = width // count - extent - 2, height - extent - 2
        x = number * (width // count) + 1 + extent // 2 + rng.randint(0, max(free_x, 0))
        y = 1 + extent // 2 + rng.randint(0, max(free_y, 0))
        elements.append(ShapeElement(kind, colour, x, y, extent))
    return Scene(size, ground, tuple(elements))


def make(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Sample:
    """A sample such as `a red circle on a white ground`; two shapes are named from left to right.

    Of those that are arranged `three red circles on ...`, or `a red circle above a blue square on ...`.
    """
    if recipe.arranged and rng.random() < recipe.arranged:
        return _arranged(recipe, rng, size, language)
    scene = plan(recipe, rng, size, language)
    names = [shape_name(e.shape, e.colour, language) for e in scene.elements if isinstance(e, ShapeElement)]
    if language == "zh":
        shown = "和".join(f"一个{name}" for name in names)
    else:
        shown = " and ".join(f"{article(name)} {name}" for name in names)
    return _sample(scene, shown, language)


def _arranged(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Sample:
    """Two to four of one shape in one colour, or two shapes of which the first is on a named side of the second."""
    width, height = size
    ground = Ground(rng.choice(recipe.ground_colours))
    colours = [c for c in readable_on(ground.colour, recipe.text_colours) if c != ground.colour]
    if len(colours) < 2 or rng.random() < 0.5:
        kind, colour, number = rng.choice(list(SHAPES)), rng.choice(colours), rng.choice(list(NUMBERS))
        things = [(kind, colour)] * number
        quarters = [(x, y, width // 2, height // 2) for y in (0, height // 2) for x in (0, width // 2)]
        cells = rng.sample(quarters, number)
        name = shape_name(kind, colour, language)
        shown = f"{NUMBERS[number][1]}个{name}" if language == "zh" else f"{NUMBERS[number][0]} {name}s"
    else:
        things = list(zip(rng.sample(list(SHAPES), 2), rng.sample(colours, 2)))
        side = rng.choice(list(SIDES))
        across = side in ("left of", "right of")
        room = (width // 2, height) if across else (width, height // 2)
        cells = [(0, 0, *room), (width // 2, 0, *room) if across else (0, height // 2, *room)]
        if side in ("right of", "below"):
            cells.reverse()
        first, second = (shape_name(kind, colour, language) for kind, colour in things)
        if language == "zh":
            shown = f"一个{first}在一个{second}的{SIDES[side]}"
        else:
            shown = f"{article(first)} {first} {side} {article(second)} {second}"
    elements = tuple(_placed(rng, kind, colour, cell) for (kind, colour), cell in zip(things, cells))
    return _sample(Scene(size, ground, elements), shown, language)


def _placed(rng: random.Random, kind: str, colour: str, cell: tuple[int, int, int, int]) -> ShapeElement:
    """Somewhere in a cell (left, top, width, height)."""
    left, top, width, height = cell
    extent = max(6, round(min(width, height) * rng.uniform(0.5, 0.9)))
    x = left + 1 + extent // 2 + rng.randint(0, max(width - extent - 2, 0))
    y = top + 1 + extent // 2 + rng.randint(0, max(height - extent - 2, 0))
    return ShapeElement(kind, colour, x, y, extent)


def _sample(scene: Scene, shown: str, language: str) -> Sample:
    ground = COLOURS[scene.ground.colour].called(language)
    caption = f"{ground}背景上的{shown}" if language == "zh" else f"{shown} on {article(ground)} {ground} ground"
    colours = {"ground": scene.ground.colour}
    colours |= {f"shape {i}": element.colour for i, element in enumerate(scene.elements)}
    boxes = tuple(element_box(element) for element in scene.elements)
    return Sample(render_scene(scene), caption, (), language, colours, boxes, "shapes")


def shape_name(shape: str, colour: str, language: str) -> str:
    """`red circle` or `红色圆形`."""
    return f"{COLOURS[colour].chinese}{SHAPES[shape]}" if language == "zh" else f"{colour} {shape}"
