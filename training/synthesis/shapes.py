"""Plain coloured shapes with captions, for the stage of a curriculum that comes before text."""

from __future__ import annotations

import random

from .canvas import SHAPES, Ground, Scene, ShapeElement, element_box, render_scene
from .colours import COLOURS, readable_on
from .recipe import SynthesisRecipe
from .sample import Sample, article


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
    """A sample such as `a red circle on a white ground`; two shapes are named from left to right."""
    scene = plan(recipe, rng, size, language)
    ground = COLOURS[scene.ground.colour].called(language)
    names = [shape_name(e.shape, e.colour, language) for e in scene.elements if isinstance(e, ShapeElement)]
    if language == "zh":
        caption = f"{ground}背景上的" + "和".join(f"一个{name}" for name in names)
    else:
        shown = " and ".join(f"{article(name)} {name}" for name in names)
        caption = f"{shown} on {article(ground)} {ground} ground"
    colours = {"ground": scene.ground.colour}
    colours |= {f"shape {i}": element.colour for i, element in enumerate(scene.elements)}
    boxes = tuple(element_box(element) for element in scene.elements)
    return Sample(render_scene(scene), caption, (), language, colours, boxes, "shapes")


def shape_name(shape: str, colour: str, language: str) -> str:
    """`red circle` or `红色圆形`."""
    return f"{COLOURS[colour].chinese}{SHAPES[shape]}" if language == "zh" else f"{colour} {shape}"
