"""Editing pairs of texts and shapes on a ground: a scene, changed in one thing and rendered again.

Of two layouts: one or two things in rows of their own, or a picture as text to image draws it, in which things go to
the nine places of the canvas.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from . import pure, shapes
from .canvas import Ground, Scene, ShapeElement, TextElement, element_box, fit_size, inside, render_scene
from .colours import COLOURS, LEAST_CONTRAST, contrast, readable_on
from .edit_words import COLUMNS, ROWS, Element, any_name, definite, indefinite, instruction_of, place_name
from .fonts import faces_for
from .recipe import SynthesisRecipe
from .sample import Box, EditSample, quote, reading_order

Changed = tuple[Scene, Scene, dict[str, str]]  # source, target, the words of the instruction
_MARGIN = 0.04  # of the shorter side: between the edge and what stands at it
_ADDED = 0.28, 0.2, 0.15  # sizes of a shape that is added to a picture, in the shorter side: the first that has room
_GAP = 3  # pixels, at least, between things in a picture
_WIDE = 0.75  # of the canvas: what is wider or taller has one place along that side


def make_pair(
    recipe: SynthesisRecipe, rng: random.Random, strategy: str, size: tuple[int, int], language: str
) -> EditSample | None:
    """A pair of `shapes` or `pure`, or None where this draw has to be dropped."""
    kind = rng.choice([kind for kind in recipe.edits if strategy != "shapes" or kind != "text"])
    # Without this field nothing is drawn for it, so that recipes from before give the pairs that they gave.
    of_picture = recipe.edits_of_pictures > 0 and rng.random() < recipe.edits_of_pictures
    changed = (_in_picture if of_picture else _in_rows)(recipe, rng, kind, strategy, size, language)
    if changed is None:
        return None
    source, target, words = changed
    only = max(len(source.elements), len(target.elements)) == 1
    instruction = instruction_of(rng, kind, language, only=only, **words)
    boxes = tuple(element_box(element) for element in _texts(target))
    return EditSample(
        render_scene(source), render_scene(target), instruction, _mask(source, target), kind, language, _lines(source),
        _lines(target), strategy, boxes,
    )  # fmt: skip


def _in_rows(
    recipe: SynthesisRecipe, rng: random.Random, kind: str, strategy: str, size: tuple[int, int], language: str
) -> Changed | None:
    """One or two things, each in a row of its own."""
    layouts = [("shape",), ("shape", "shape")] if strategy == "shapes" else [("text",), ("text", "shape")]
    if strategy == "pure" and recipe.max_lines > 1:
        layouts.append(("text", "text"))
    layout = list(rng.choice(layouts))
    rng.shuffle(layout)
    ground, bands = pure.draw_ground(recipe, rng), _bands(size, len(layout), rng)
    elements: list[Element] = []
    for what, band in zip(layout, bands):
        element = _element(recipe, rng, what, ground, band, language, elements)
        if element is None:
            return None
        elements.append(element)
    chosen = rng.randrange(len(elements))
    scene, band, name = Scene(size, ground, tuple(elements)), bands[chosen], definite(elements[chosen], language)
    element = elements[chosen]
    if kind == "add":
        place = _place(element, band, size, language)
        return _without(scene, element), scene, {"what": indefinite(element, language), "place": place}
    if kind == "move":
        if not isinstance(element, ShapeElement):
            return None
        moved = rng.choice([e for e in _thirds(element, band) if e.x != element.x])
        return (
            scene,
            _with(scene, element, moved),
            {"what": name, "place": place_name("middle", _column(moved, band), language)},
        )
    return _changed(recipe, rng, kind, scene, element, band, name, language)


def _in_picture(
    recipe: SynthesisRecipe, rng: random.Random, kind: str, strategy: str, size: tuple[int, int], language: str
) -> Changed | None:
    """What text to image draws of the recipe: a thing that can be told from all others is changed, or one added."""
    if strategy == "pure":
        scene = pure.plan(recipe, rng, size, language)
        if scene is None:
            return None
    else:
        scene, _ = shapes.told_scene(recipe, rng, size, language)
    if kind == "add":
        return _added(recipe, rng, scene, strategy, language)
    names = [definite(element, language) for element in scene.elements]
    single = [element for element, name in zip(scene.elements, names) if names.count(name) == 1]
    if not single and kind not in ("ground", "reconstruct"):
        return None
    element = rng.choice(single or scene.elements)
    name = any_name(rng, element, _without(scene, element).elements, language)
    if kind == "move":
        found = list(_places(recipe, scene, element))
        if not found:
            return None
        row, column, moved = rng.choice(found)
        return scene, _with(scene, element, moved), {"what": name, "place": place_name(row, column, language)}
    margin = _margin(size)
    whole = margin, margin, size[0] - margin, size[1] - margin
    return _changed(recipe, rng, kind, scene, element, whole, name, language)


def _added(recipe: SynthesisRecipe, rng: random.Random, scene: Scene, strategy: str, language: str) -> Changed | None:
    """A shape, or beside a text at times another text, at one of the places where it has room."""
    colour = rng.choice(readable_on(scene.ground.colour, recipe.text_colours))
    found: list[tuple[str, str, Element]] = []
    if strategy == "pure" and rng.random() < 0.4:
        text = recipe.words().text(rng, language, recipe.longest(language))
        face, margin = rng.choice(recipe.faces(language)), _margin(scene.size)
        if text in _lines(scene) or not faces_for((face,), text):
            return None
        room = scene.size[0] - 2 * margin, scene.size[1] // 4
        font_size = fit_size((text,), face, room, smallest=recipe.legible(language), largest=recipe.largest())
        if font_size is None:
            return None
        found = list(_places(recipe, scene, TextElement(text, (text,), face, font_size, colour, 0, 0)))
    else:
        kind = rng.choice(recipe.kinds)
        if any(isinstance(e, ShapeElement) and (e.shape, e.colour) == (kind, colour) for e in scene.elements):
            return None
        sizes: dict[tuple[str, str], Element] = {}
        for share in _ADDED:
            one = ShapeElement(kind, colour, 0, 0, max(6, round(share * min(scene.size))))
            for row, column, element in _places(recipe, scene, one):
                sizes.setdefault((row, column), element)
        found = [(*place, element) for place, element in sizes.items()]
    if not found:
        return None
    row, column, element = rng.choice(found)
    place = place_name(row, column, language)
    return (
        scene,
        replace(scene, elements=(*scene.elements, element)),
        {"what": indefinite(element, language), "place": place},
    )


def _places(recipe: SynthesisRecipe, scene: Scene, element: Element) -> Iterator[tuple[str, str, Element]]:
    """Row, column and the element there, for each of the nine places that is free and not where it stands.

    What is moved `to the top` keeps its column, `to the left` its row; `to the center` goes what is in the middle row.
    """
    others = [element_box(other) for other in scene.elements if other != element]
    moved = element in scene.elements
    width, height = element.mask().size
    in_middle = abs(element.y - scene.size[1] // 2) <= max(1, recipe.rows // 2)
    for row in ROWS if height <= _WIDE * scene.size[1] else ("middle",):
        for column in COLUMNS if width <= _WIDE * scene.size[0] else ("center",):
            if moved and (row, column) == ("middle", "center") and not in_middle:
                continue
            x = _along(column == "left", column == "right", width, scene.size[0], 0)
            y = _along(row == "top", row == "bottom", height, scene.size[1], recipe.rows)
            if moved and row == "middle":
                y = element.y
            elif moved and column == "center":
                x = element.x
            there = replace(element, x=x, y=y)
            far = abs(x - element.x) + abs(y - element.y) > 0.08 * min(scene.size)
            free = inside(element_box(there), scene.size) and not any(_touch(element_box(there), o) for o in others)
            if free and (far or not moved):
                yield row, column, there


def _along(first: bool, last: bool, extent: int, side: int, grid: int) -> int:
    """The centre of a thing at the near edge, at the far one or in the middle, on a multiple of the grid inside."""
    near, far = _margin((side, side)) + extent // 2, side - _margin((side, side)) - (extent - extent // 2)
    centre = near if first else far if last else side // 2
    if not grid:
        return centre
    centre = grid * round(centre / grid)
    if centre - extent // 2 < 1:
        centre += grid
    return centre - grid if centre + extent - extent // 2 >= side else centre


def _touch(one: Box, other: Box) -> bool:
    return all(one[i] - _GAP < other[i + 2] and other[i] - _GAP < one[i + 2] for i in (0, 1))


def _margin(size: tuple[int, int]) -> int:
    return max(1, round(_MARGIN * min(size)))


def _without(scene: Scene, element: Element) -> Scene:
    return replace(scene, elements=tuple(one for one in scene.elements if one != element))


def _with(scene: Scene, old: Element, new: Element) -> Scene:
    return replace(scene, elements=tuple(new if one == old else one for one in scene.elements))


def _changed(
    recipe: SynthesisRecipe, rng: random.Random, kind: str, scene: Scene, element: Element, band: Box, name: str,
    language: str,
) -> Changed | None:  # fmt: skip
    """With another colour, text or ground, without the element or with nothing changed; None where that cannot be."""
    if kind == "reconstruct":
        return scene, scene, {}
    if kind == "ground":
        others = [c for c in recipe.ground_colours if c != scene.ground.colour and _suits(c, scene.elements)]
        if not others:
            return None
        ground = replace(scene.ground, colour=rng.choice(others))
        return scene, replace(scene, ground=ground), {"colour": COLOURS[ground.colour].called(language)}
    if kind == "remove":
        return scene, _without(scene, element), {"what": name}
    if kind == "colour":
        taken = {e.colour for e in scene.elements}
        others = [c for c in readable_on(scene.ground.colour, recipe.text_colours) if c not in taken]
        if not others:
            return None
        colour = rng.choice(others)
        words = {"what": name, "colour": COLOURS[colour].called(language)}
        return scene, _with(scene, element, replace(element, colour=colour)), words
    if not isinstance(element, TextElement):
        return None
    new = _rewritten(recipe, rng, element, band, language)
    if new is None or new.text in _lines(scene):
        return None
    words = {"old": quote(element.text, language), "new": quote(new.text, language)}
    return scene, _with(scene, element, new), words


def _bands(size: tuple[int, int], count: int, rng: random.Random) -> list[Box]:
    """The canvas cut into rows; a single element gets the upper, middle or lower part."""
    width, height = size
    margin = _margin(size)
    if count == 1:
        tall = round(height * rng.uniform(0.45, 0.7))
        top = rng.choice((margin, (height - tall) // 2, height - tall - margin))
        return [(margin, top, width - margin, top + tall)]
    middle, gap = height // 2, max(1, height // 32)
    return [(margin, margin, width - margin, middle - gap), (margin, middle + gap, width - margin, height - margin)]


def _element(
    recipe: SynthesisRecipe,
    rng: random.Random,
    what: str,
    ground: Ground,
    band: Box,
    language: str,
    others: list[Element],
) -> Element | None:
    """A text or a shape in a row, of another colour, kind and text than the others."""
    readable = readable_on(ground.colour, recipe.text_colours)
    colours = [c for c in readable if c not in {e.colour for e in others}]
    if not colours:
        return None
    colour = rng.choice(colours)
    width, height = band[2] - band[0], band[3] - band[1]
    middle = (band[1] + band[3]) // 2
    if recipe.rows:
        middle = recipe.rows * round(middle / recipe.rows)
    centre = (band[0] + band[2]) // 2, middle
    if what == "shape":
        kinds = [s for s in recipe.kinds if s not in {e.shape for e in others if isinstance(e, ShapeElement)}]
        extent = max(6, int(min(height, width / 3) * rng.uniform(0.75, 0.95)))
        return rng.choice(_thirds(ShapeElement(rng.choice(kinds), colour, *centre, extent), band))
    text = recipe.words().text(rng, language, recipe.longest(language))
    face = rng.choice(recipe.faces(language))
    taken = {e.text for e in others if isinstance(e, TextElement)}
    if text in taken or not faces_for((face,), text):
        return None
    share = rng.uniform(recipe.fill, 1.0)
    room = int(width * share), int(height * share)
    font_size = fit_size((text,), face, room, smallest=recipe.legible(language), largest=recipe.largest())
    return TextElement(text, (text,), face, font_size, colour, *centre) if font_size else None


def _rewritten(
    recipe: SynthesisRecipe, rng: random.Random, element: TextElement, band: Box, language: str
) -> TextElement | None:
    """Another text in the same place and size, or smaller where it would not fit."""
    text = recipe.words().text(rng, language, recipe.longest(language))
    room = band[2] - band[0], band[3] - band[1]
    smallest = recipe.legible(language)
    if not faces_for((element.face,), text):
        return None
    size = fit_size((text,), element.face, room, smallest=smallest, largest=element.size)
    return replace(element, text=text, lines=(text,), size=size) if size else None


def _thirds(element: ShapeElement, band: Box) -> list[ShapeElement]:
    """The shape at the left, in the centre and at the right of its row."""
    width, half = band[2] - band[0], element.size // 2 + 1
    xs = (band[0] + half, band[0] + width // 2, band[2] - half)
    return [replace(element, x=x) for x in xs]


def _suits(ground: str, elements: tuple[Element, ...]) -> bool:
    return all(contrast(element.colour, ground) >= LEAST_CONTRAST for element in elements)


def _texts(scene: Scene) -> list[TextElement]:
    """As they are read."""
    texts = [element for element in scene.elements if isinstance(element, TextElement)]
    return [texts[i] for i in reading_order([element_box(element) for element in texts])]


def _lines(scene: Scene) -> tuple[str, ...]:
    return tuple(element.text for element in _texts(scene))


def _mask(source: Scene, target: Scene) -> np.ndarray:
    mask = np.full(source.size[::-1], source.ground != target.ground)
    for element in set(source.elements) ^ set(target.elements):
        fill(mask, element_box(element))
    return mask


def fill(mask: np.ndarray, box: Box) -> None:
    left, top, right, bottom = box
    mask[max(0, top) : bottom, max(0, left) : right] = True


def _place(element: Element, band: Box, size: tuple[int, int], language: str) -> str:
    """Row and column of nine."""
    third = (element.y * 8 // size[1] > 2) + (element.y * 8 // size[1] > 4)
    column = _column(element, band) if isinstance(element, ShapeElement) else "center"
    return place_name(tuple(ROWS)[third], column, language)


def _column(element: ShapeElement, band: Box) -> str:
    return tuple(COLUMNS)[[e.x for e in _thirds(element, band)].index(element.x)]
