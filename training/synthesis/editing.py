"""Editing pairs from the same generator: the same drawing as a value, changed in one thing and rendered again."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from . import complex as complex_layouts
from . import compositional, vision
from .canvas import Ground, Scene, ShapeElement, TextElement, element_box, fit_size, render_scene
from .colours import COLOURS, LEAST_CONTRAST, contrast, readable_on
from .fonts import faces_for
from .generator import retried
from .pure import draw_ground
from .recipe import SynthesisRecipe
from .sample import Box, EditSample, article, quote
from .shapes import shape_name

Element = TextElement | ShapeElement

# Kind → instructions in English and Chinese.
_INSTRUCTIONS = {
    "text": (("replace {old} with {new}", "change {old} to {new}"), ("把{old}改成{new}", "将{old}替换为{new}")),
    "colour": (("make {what} {colour}", "change the color of {what} to {colour}"), ("把{what}变成{colour}",)),
    "ground": (("change the ground to {colour}", "make the ground {colour}"), ("把背景换成{colour}",)),
    "add": (("add {what} at the {place}",), ("在{place}加上{what}",)),
    "remove": (("remove {what}", "erase {what}"), ("去掉{what}", "把{what}删掉")),
    "move": (("move {what} to the {place}",), ("把{what}移到{place}",)),
    "reconstruct": (("keep the picture as it is", "reproduce the picture"), ("保持图片不变", "重现这张图片")),
}
# Of a picture with a single text or shape: there is nothing to tell it from.
_OF_THE_ONLY_ONE = {
    "text": (("change the text to {new}",), ("把文字改成{new}",)),
    "colour": (("make it {colour}",), ("把它变成{colour}",)),
}
_COLUMNS = {"left": "左", "center": "中", "right": "右"}
_COLUMN_NAMES = {"left": "左边", "center": "中间", "right": "右边"}
_ROWS = {"top": "上", "middle": "中", "bottom": "下"}


def make_edit(recipe: SynthesisRecipe, seed: int, index: int) -> EditSample:
    """Editing pair `index` of a recipe: a pure function of its arguments and the font files, as `generator.make`.

    Pairs of `shapes` and `pure` change the text, a colour or the ground, add, remove or move an element, or ask for the
    same picture; of `compositional` the text, its colour, the medium's colour or nothing; of `complex` a text, the
    title's colour or nothing; of `scenes` see `vision`. Raises as `generator.make`.
    """
    return retried(replace(recipe, languages=recipe.edit_languages or recipe.languages), seed, index, _draw)


def _draw(
    recipe: SynthesisRecipe, rng: random.Random, strategy: str, size: tuple[int, int], language: str
) -> EditSample | None:
    if strategy == "compositional":
        return _composite_pair(recipe, rng, size, language)
    if strategy == "complex":
        return _page_pair(recipe, rng, size, language)
    if strategy == "scenes":
        return vision.make_pair(recipe, rng, size, language)
    return _scene_pair(recipe, rng, strategy, size, language)


def _scene_pair(
    recipe: SynthesisRecipe, rng: random.Random, strategy: str, size: tuple[int, int], language: str
) -> EditSample | None:
    kind = rng.choice([kind for kind in recipe.edits if strategy != "shapes" or kind != "text"])
    layouts = [("shape",), ("shape", "shape")] if strategy == "shapes" else [("text",), ("text", "shape")]
    if strategy == "pure" and recipe.max_lines > 1:
        layouts.append(("text", "text"))
    layout = list(rng.choice(layouts))
    rng.shuffle(layout)
    ground, bands = draw_ground(recipe, rng), _bands(size, len(layout), rng)
    elements: list[Element] = []
    for what, band in zip(layout, bands):
        element = _element(recipe, rng, what, ground, band, language, elements)
        if element is None:
            return None
        elements.append(element)
    whole = Scene(size, ground, tuple(elements))
    chosen = rng.randrange(len(elements))
    changed = _changed(recipe, rng, kind, whole, chosen, bands[chosen], language)
    if changed is None:
        return None
    source, target, words = changed
    mask = _scene_mask(source, target)
    instruction = _instruction(rng, kind, language, only=len(elements) == 1, **words)
    images = render_scene(source), render_scene(target)
    boxes = tuple(element_box(element) for element in target.elements if isinstance(element, TextElement))
    return EditSample(*images, instruction, mask, kind, language, _texts(source), _texts(target), strategy, boxes)


def _changed(
    recipe: SynthesisRecipe, rng: random.Random, kind: str, scene: Scene, chosen: int, band: Box, language: str
) -> tuple[Scene, Scene, dict[str, str]] | None:
    """Source, target and the words of the instruction; None where this scene cannot be changed so."""
    element = scene.elements[chosen]
    name = _name(element, language)
    if kind == "reconstruct":
        return scene, scene, {}
    if kind == "ground":
        others = [c for c in recipe.ground_colours if c != scene.ground.colour and _suits(c, scene.elements)]
        if not others:
            return None
        ground = replace(scene.ground, colour=rng.choice(others))
        return scene, replace(scene, ground=ground), {"colour": COLOURS[ground.colour].called(language)}
    if kind in ("add", "remove"):
        without = replace(scene, elements=scene.elements[:chosen] + scene.elements[chosen + 1 :])
        if kind == "remove":
            return scene, without, {"what": name}
        place = _place(element, band, scene.size, language)
        return without, scene, {"what": _indefinite(element, language), "place": place}
    if kind == "colour":
        taken = {e.colour for e in scene.elements}
        others = [c for c in readable_on(scene.ground.colour, recipe.text_colours) if c not in taken]
        if not others:
            return None
        colour = rng.choice(others)
        new: Element | None = replace(element, colour=colour)
        words = {"what": name, "colour": COLOURS[colour].called(language)}
    elif kind == "text":
        if not isinstance(element, TextElement):
            return None
        new = _rewritten(recipe, rng, element, band, language)
        words = {"old": quote(element.text, language), "new": quote(new.text, language) if new else ""}
        if new is not None and new.text in _texts(scene):
            return None
    else:
        if not isinstance(element, ShapeElement):
            return None
        new = rng.choice([e for e in _thirds(element, band) if e.x != element.x])
        words = {"what": name, "place": _column(new, band, language)}
    if new is None:
        return None
    elements = (*scene.elements[:chosen], new, *scene.elements[chosen + 1 :])
    return scene, replace(scene, elements=elements), words


def _bands(size: tuple[int, int], count: int, rng: random.Random) -> list[Box]:
    """The canvas cut into rows; a single element gets the upper, middle or lower part."""
    width, height = size
    margin = max(1, round(0.04 * min(size)))
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


def _texts(scene: Scene) -> tuple[str, ...]:
    return tuple(element.text for element in scene.elements if isinstance(element, TextElement))


def _scene_mask(source: Scene, target: Scene) -> np.ndarray:
    mask = np.full(source.size[::-1], source.ground != target.ground)
    for element in set(source.elements) ^ set(target.elements):
        _fill(mask, element_box(element))
    return mask


def _fill(mask: np.ndarray, box: Box) -> None:
    left, top, right, bottom = box
    mask[max(0, top) : bottom, max(0, left) : right] = True


def _name(element: Element, language: str) -> str:
    if isinstance(element, ShapeElement):
        name = shape_name(element.shape, element.colour, language)
        return name if language == "zh" else f"the {name}"
    return ("文字" if language == "zh" else "the text ") + quote(element.text, language)


def _indefinite(element: Element, language: str) -> str:
    colour = COLOURS[element.colour].called(language)
    if isinstance(element, ShapeElement):
        name = shape_name(element.shape, element.colour, language)
        return f"一个{name}" if language == "zh" else f"{article(name)} {name}"
    text = quote(element.text, language)
    return f"{colour}文字{text}" if language == "zh" else f"the {colour} text {text}"


def _place(element: Element, band: Box, size: tuple[int, int], language: str) -> str:
    """Row and column of nine: `top left`, `bottom`, `center`; `左上方`."""
    third = (element.y * 8 // size[1] > 2) + (element.y * 8 // size[1] > 4)
    row = tuple(_ROWS)[third]
    column = "center"
    if isinstance(element, ShapeElement):
        column = _column(element, band, "en")
    if row == "middle":
        return _COLUMN_NAMES[column] if language == "zh" else column
    if language == "zh":
        return (_COLUMNS[column] if column != "center" else "") + _ROWS[row] + "方"
    return row if column == "center" else f"{row} {column}"


def _column(element: ShapeElement, band: Box, language: str) -> str:
    column = tuple(_COLUMNS)[[e.x for e in _thirds(element, band)].index(element.x)]
    return _COLUMN_NAMES[column] if language == "zh" else column


def _instruction(rng: random.Random, kind: str, language: str, only: bool = False, **words: str) -> str:
    english, chinese = _INSTRUCTIONS[kind]
    if only and kind in _OF_THE_ONLY_ONE and rng.random() < 0.5:
        english, chinese = _OF_THE_ONLY_ONE[kind]
    return rng.choice(chinese if language == "zh" else english).format(**words)


def _composite_pair(
    recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str
) -> EditSample | None:
    source = compositional.plan(recipe, rng, size, language)
    kind = rng.choice(("text", "text", "colour", "ground", "reconstruct"))
    if source is None:
        return None
    target, words = source, {}
    if kind == "text":
        text = recipe.words().text(rng, language, recipe.longest(language))
        if text in source.texts or not faces_for((source.face,), text):
            return None
        texts = (text, *source.texts[1:])
        font_size = compositional.fitted_size(texts, source.face, source.flat, recipe.legible(language))
        if font_size is None:
            return None
        target = replace(source, texts=texts, font_size=min(font_size, source.font_size))
        words = {"old": quote(source.texts[0], language), "new": quote(text, language)}
    elif kind != "reconstruct":
        if kind == "colour":
            what = "文字" if language == "zh" else "the text"
            others = [c for c in readable_on(source.colour, recipe.text_colours) if c != source.text_colour]
        else:  # of the medium, whose name is not "the ground" for a reader of the instruction
            what = compositional.MEDIA[source.medium][0] if language == "zh" else f"the {source.medium}"
            others = [c for c in compositional.MEDIA[source.medium][3] if c != source.colour]
            others = [c for c in others if contrast(c, source.text_colour) >= LEAST_CONTRAST]
        if not others:
            return None
        colour = rng.choice(others)
        target = replace(source, text_colour=colour) if kind == "colour" else replace(source, colour=colour)
        kind = "colour"
        words = {"what": what, "colour": COLOURS[colour].called(language)}
    mask = np.zeros(size[::-1], bool)
    if kind != "reconstruct":
        _fill(mask, compositional.medium_box(source))
    (before, _), (after, _) = compositional.render(source), compositional.render(target)
    instruction = _instruction(rng, kind, language, **words)
    return EditSample(before, after, instruction, mask, kind, language, source.texts, target.texts, "compositional")


def _page_pair(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> EditSample | None:
    source = complex_layouts.plan(recipe, rng, size, language)
    kind = rng.choice(("text", "text", "colour", "reconstruct"))
    if source is None:
        return None
    texts = [slot.text for slot in source.slots]
    slots, words, changed = list(source.slots), {}, []
    if kind == "text":
        number = rng.choice([i for i, slot in enumerate(slots) if slot.role not in ("label", "header")])
        old = slots[number]
        new = recipe.words().phrase(rng, language, rng.randint(1, 2))
        if old.text.replace("-", "").isdigit():
            new = recipe.words().number(rng, 3)
        room = old.box[2] - old.box[0], old.box[3] - old.box[1]
        font_size = dict(source.sizes)[old.group]
        fits = fit_size((new,), source.face, room, smallest=font_size, largest=font_size)
        if fits is None or new in texts or texts.count(old.text) > 1:
            return None
        slots[number], changed = replace(old, text=new), [number]
        words = {"old": quote(old.text, language), "new": quote(new, language)}
    elif kind == "colour":
        changed = [i for i, slot in enumerate(slots) if slot.role == "title"]
        grounds = source.accent if source.kind == "slide" else source.ground.colour
        others = [c for c in readable_on(grounds, recipe.text_colours) if changed and c != slots[changed[0]].colour]
        if not others:
            return None
        colour = rng.choice(others)
        for number in changed:
            slots[number] = replace(slots[number], colour=colour)
        words = {"what": "标题" if language == "zh" else "the title", "colour": COLOURS[colour].called(language)}
    target = replace(source, slots=tuple(slots))
    (before, old_boxes), (after, new_boxes) = complex_layouts.render(source), complex_layouts.render(target)
    mask = np.zeros(size[::-1], bool)
    for number in changed:
        for box in (old_boxes[number], new_boxes[number]):
            _fill(mask, box)
    instruction = _instruction(rng, kind, language, **words)
    after_texts = tuple(slot.text for slot in target.slots)
    return EditSample(before, after, instruction, mask, kind, language, tuple(texts), after_texts, "complex")
