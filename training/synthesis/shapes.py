"""Plain coloured shapes with captions, for the stage of a curriculum that comes before text."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .canvas import SHAPES, Ground, Scene, ShapeElement, element_box, render_scene
from .colours import COLOURS, readable_on
from .recipe import SynthesisRecipe
from .sample import Sample, article

NUMBERS = {2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四")}
SIDES = {"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"}
_CENTRED_SIZES = 0.55, 0.7  # of the shapes of a picture, in the smaller side of their cells

Cell = tuple[int, int, int, int]  # left, top, width, height


def plan(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Scene:
    """One or two shapes of different kind and colour."""
    width, height = size
    ground = Ground(rng.choice(recipe.ground_colours))
    colours = [c for c in readable_on(ground.colour, recipe.text_colours) if c != ground.colour]
    count = 2 if rng.random() < 0.4 and len(colours) > 1 else 1
    things = list(zip(kinds_of(recipe, rng, count), rng.sample(colours, count)))
    if recipe.centred:
        cells = [(0, 0, width, height)] if count == 1 else _halves(size, across=True)
        return Scene(size, ground, _centred(rng, things, cells))
    elements = []
    for number, (kind, colour) in enumerate(things):
        room = min(width // count, height)
        extent = max(6, round(room * rng.uniform(0.4, 0.85)))
        free_x, free_y = width // count - extent - 2, height - extent - 2
        x = number * (width // count) + 1 + extent // 2 + rng.randint(0, max(free_x, 0))
        y = 1 + extent // 2 + rng.randint(0, max(free_y, 0))
        elements.append(ShapeElement(kind, colour, x, y, extent))
    return Scene(size, ground, tuple(elements))


def kinds_of(recipe: SynthesisRecipe, rng: random.Random, count: int) -> list[str]:
    """So many different kinds, one that the recipe names twice twice as often first."""
    found: list[str] = []
    while len(set(found)) < count:
        found = rng.sample(recipe.kinds, count)
    return found


def make(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Sample:
    """A sample such as `a red circle on a white ground`; two shapes are named from left to right.

    Of those that are arranged `three red circles on ...`, or `a red circle above a blue square on ...`.
    """
    return _sample(*told_scene(recipe, rng, size, language), language)


def told_scene(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> tuple[Scene, str]:
    """What `make` draws, and what it says of the shapes."""
    if recipe.arranged and rng.random() < recipe.arranged:
        return _arranged(recipe, rng, size, language)
    scene = plan(recipe, rng, size, language)
    names = [shape_name(e.shape, e.colour, language) for e in scene.elements if isinstance(e, ShapeElement)]
    if language == "zh":
        return scene, "和".join(f"一个{name}" for name in names)
    return scene, " and ".join(f"{article(name)} {name}" for name in names)


def _arranged(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> tuple[Scene, str]:
    """Two to four of one shape in one colour, or two shapes of which the first is on a named side of the second."""
    ground = Ground(rng.choice(recipe.ground_colours))
    colours = [c for c in readable_on(ground.colour, recipe.text_colours) if c != ground.colour]
    if len(colours) < 2 or rng.random() < 0.5:
        kind, colour, number = rng.choice(recipe.kinds), rng.choice(colours), rng.choice(list(NUMBERS))
        things = [(kind, colour)] * number
        cells = _rows_of(number, size) if recipe.centred else rng.sample(_rows_of(4, size), number)
        name = shape_name(kind, colour, language)
        shown = f"{NUMBERS[number][1]}个{name}" if language == "zh" else f"{NUMBERS[number][0]} {name}s"
    else:
        things = list(zip(kinds_of(recipe, rng, 2), rng.sample(colours, 2)))
        side = rng.choice(list(SIDES))
        cells = _halves(size, across=side in ("left of", "right of"))
        if side in ("right of", "below"):
            cells.reverse()
        first, second = (shape_name(kind, colour, language) for kind, colour in things)
        if language == "zh":
            shown = f"一个{first}在一个{second}的{SIDES[side]}"
        else:
            shown = f"{article(first)} {first} {side} {article(second)} {second}"
    elements = (_centred if recipe.centred else _placed)(rng, things, cells)
    return Scene(size, ground, elements), shown


def _halves(size: tuple[int, int], across: bool) -> list[Cell]:
    """Left and right, or upper and lower."""
    width, height = size
    room = (width // 2, height) if across else (width, height // 2)
    return [(0, 0, *room), (width // 2, 0, *room) if across else (0, height // 2, *room)]


def _rows_of(number: int, size: tuple[int, int]) -> list[Cell]:
    """Two in a row in the middle, three as one above two, four in the quarters."""
    width, height = size[0] // 2, size[1] // 2
    if number == 2:
        return _halves(size, across=True)
    upper = [width // 2] if number == 3 else [0, width]
    return [(x, y, width, height) for y, xs in ((0, upper), (height, [0, width])) for x in xs]


def _centred(rng: random.Random, things: Sequence[tuple[str, str]], cells: Sequence[Cell]) -> tuple[ShapeElement, ...]:
    """In the middle of their cells, in one of two sizes: little is left to chance that a caption does not say."""
    share, elements = rng.choice(_CENTRED_SIZES), []
    for (kind, colour), (left, top, width, height) in zip(things, cells):
        extent = max(6, round(share * min(width, height)))
        elements.append(ShapeElement(kind, colour, left + width // 2, top + height // 2, extent))
    return tuple(elements)


def _placed(rng: random.Random, things: Sequence[tuple[str, str]], cells: Sequence[Cell]) -> tuple[ShapeElement, ...]:
    """Somewhere in their cells."""
    elements = []
    for (kind, colour), (left, top, width, height) in zip(things, cells):
        extent = max(6, round(min(width, height) * rng.uniform(0.5, 0.9)))
        x = left + 1 + extent // 2 + rng.randint(0, max(width - extent - 2, 0))
        y = top + 1 + extent // 2 + rng.randint(0, max(height - extent - 2, 0))
        elements.append(ShapeElement(kind, colour, x, y, extent))
    return tuple(elements)


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
