"""Pure rendering: texts and paragraphs on plain and textured grounds (the report's first strategy)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from .canvas import Ground, Scene, TextElement, element_box, fit_paragraph, fit_size, inside, render_scene
from .colours import COLOURS, readable_on
from .fonts import Face, FontDecides, faces_for
from .recipe import SynthesisRecipe
from .sample import Description, Sample, article, quotable, quote

_NATURAL = {
    "en": (
        "On {a} {ground} ground, displaying {texts}{turn}",
        "A picture of {texts} on {a} {ground} ground{turn}",
        "{A} {ground} background with {texts}{turn}",
        "Writing on {a} {ground} ground: {texts}{turn}",
    ),
    "zh": (
        "{ground}背景上{texts}{turn}",
        "一张{ground}背景的图片，上面写着{texts}{turn}",
        "在{ground}背景上显示{texts}{turn}",
    ),
}
_GAP = (0.3, 0.45)  # between texts, in font sizes


def plan(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Scene | None:
    """A scene, or None where this draw has to be dropped: a glyph is missing, or the text would be too small."""
    if rng.random() < recipe.paragraph:
        return _plan_paragraph(recipe, rng, size, language)
    return _plan_texts(recipe, rng, size, language)


def make(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Sample | None:
    """A sample, or None where this draw has to be dropped."""
    scene = plan(recipe, rng, size, language)
    if scene is None:
        return None
    texts = [element for element in scene.elements if isinstance(element, TextElement)]
    told = _told(recipe, rng, scene.ground, texts, language)
    boxes = tuple(element_box(element) for element in texts)
    return Sample(render_scene(scene), told.caption, told.lines, language, told.colours, boxes, "pure")


def describe(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Description | None:
    """What `make` would tell of the sample that it makes of the same random numbers, without a font; None: dropped.

    Raises:
        FontDecides: whether the texts fit, or what else is drawn, is another thing with each font.
    """
    if rng.random() < recipe.paragraph or recipe.fonts_per_language != 1 or not recipe.centred:
        raise FontDecides
    drawn = _drawn_texts(recipe, rng, size, language, (None,))
    if drawn is None:
        return None
    ground, elements, room = drawn
    if not _surely_fit(recipe, elements, room, size, language):
        raise FontDecides
    if len(elements) > 1:
        rng.uniform(*_GAP)
    return _told(recipe, rng, ground, elements, language)


def _surely_fit(
    recipe: SynthesisRecipe, elements: list[TextElement], room: tuple[int, int], size: tuple[int, int], language: str
) -> bool:
    """Whether upright texts fit in any font: no glyph of a legible one is wider than 1.25 or higher than 1.5 sizes."""
    count, least, height = len(elements), recipe.legible(language), _height_of_one(room[1], len(elements))
    gaps = (count - 1) * round(_GAP[1] * recipe.largest())
    return (
        not any(element.angle for element in elements)
        and max(len(element.text) for element in elements) * 1.25 * least <= room[0]
        and 1.5 * least <= height
        and count * height + gaps <= size[1] - 2
    )


def _told(
    recipe: SynthesisRecipe, rng: random.Random, ground: Ground, texts: list[TextElement], language: str
) -> Description:
    natural = rng.random() < recipe.natural
    # Without this field nothing is drawn for it, so that recipes from before give the pictures that they gave.
    other = recipe.other_captions > 0 and rng.random() < recipe.other_captions
    told_in = {"en": "zh", "zh": "en"}[language] if other else language
    colours = {"ground": ground.colour, "text": texts[0].colour}
    colours |= {f"text {i}": element.colour for i, element in enumerate(texts) if i}
    caption = _natural_caption(rng, ground, texts, told_in) if natural else fixed_caption(ground, texts, told_in)
    return Description(caption, tuple(element.text for element in texts), language, colours)


def draw_ground(recipe: SynthesisRecipe, rng: random.Random) -> Ground:
    """A colour and a texture of the recipe."""
    return Ground(rng.choice(recipe.ground_colours), rng.choice(recipe.textures), rng.getrandbits(32))


def _plan_texts(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Scene | None:
    drawn = _drawn_texts(recipe, rng, size, language, recipe.faces(language))
    if drawn is None:
        return None
    ground, elements, (width, height) = drawn
    box = width, _height_of_one(height, len(elements))
    sizes = [
        fit_size(one.lines, one.face, box, angle=one.angle, smallest=recipe.legible(language), largest=recipe.largest())
        for one in elements
    ]
    if None in sizes:
        return None
    font_size = min(s for s in sizes if s is not None)
    return _stacked(recipe, rng, size, ground, [dataclasses.replace(one, size=font_size) for one in elements])


def _drawn_texts(
    recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str, faces: Sequence[Face | None]
) -> tuple[Ground, list[TextElement], tuple[int, int]] | None:
    """The ground, texts that have neither size nor place yet, and the room for them; a face None has all glyphs."""
    ground, face = draw_ground(recipe, rng), rng.choice(faces)
    count = rng.randint(1, recipe.max_lines)
    words, longest = recipe.words(), recipe.longest(language)
    texts = [words.text(rng, language, longest) for _ in range(count)]
    if len(set(texts)) < count or (face is not None and not faces_for((face,), "".join(texts))):
        return None
    readable = readable_on(ground.colour, recipe.text_colours)
    colours = [rng.choice(readable)] * count
    if count > 1 and rng.random() < 0.4:
        colours = [rng.choice(readable) for _ in texts]
    angle = round(rng.uniform(-recipe.rotation, recipe.rotation), 1) if count == 1 and rng.random() < 0.5 else 0.0
    elements = [TextElement(t, (t,), face or Face(""), 0, c, 0, 0, angle) for t, c in zip(texts, colours)]
    return ground, elements, _room(recipe, rng, size)


def _height_of_one(height: int, count: int) -> int:
    """Of texts one above the other, with room for what is between them."""
    return int(height / (1.4 * count - 0.4))


def _stacked(
    recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], ground: Ground, elements: list[TextElement]
) -> Scene | None:
    """Place the texts one above the other, aligned, inside the canvas."""
    extents = [element.mask().size for element in elements]
    gap = round(elements[0].size * rng.uniform(*_GAP)) if len(elements) > 1 else 0
    height = sum(h for _, h in extents) + gap * (len(elements) - 1)
    width = max(w for w, _ in extents)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    align = "center"
    if not recipe.centred:
        margin = max(1, min(size) // 40)
        left, top = (rng.randint(margin, 2 * middle - margin) if middle > margin else middle for middle in (left, top))
        align = rng.choice(("left", "center", "right"))
    placed = []
    for element, (w, h) in zip(elements, extents):
        x = left + {"left": 0, "center": (width - w) // 2, "right": width - w}[align]
        placed.append(_at(element, x + w // 2, top + h // 2))
        top += h + gap
    if not all(inside(element_box(element), size) for element in placed):
        return None
    return Scene(size, ground, tuple(placed))


def _plan_paragraph(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> Scene | None:
    text = _paragraph(recipe, rng, size, language)
    face = _covering_face(recipe, rng, text, language)
    if face is None or not quotable(text):
        return None
    ground = draw_ground(recipe, rng)
    width, height = _room(recipe, rng, size)
    smallest = recipe.legible(language)
    spacing = round(rng.uniform(1.15, 1.6), 2)
    largest = rng.randint(smallest, max(smallest, min(size) // 7))
    fitted = fit_paragraph(text, face, (width, height), smallest=smallest, largest=largest, spacing=spacing)
    if fitted is None:
        return None
    font_size, lines = fitted
    colour = rng.choice(readable_on(ground.colour, recipe.text_colours))
    align = rng.choice(("left", "left", "center", "right")) if not recipe.centred else "center"
    angle = round(rng.uniform(-recipe.rotation, recipe.rotation), 1) if rng.random() < 0.25 else 0.0
    element = TextElement(text, lines, face, font_size, colour, 0, 0, angle, spacing, align)
    scene = _stacked(recipe, rng, size, ground, [element])
    # Turned, it may no longer fit: then it is set upright, where it does.
    return scene or _stacked(recipe, rng, size, ground, [_upright(element)])


def _paragraph(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int], language: str) -> str:
    given = [text for text in recipe.paragraphs if _is_chinese(text) == (language == "zh")]
    if given:
        return " ".join(rng.choice(given).split())
    most = max(1, min(6, size[0] * size[1] // (160 * recipe.legible(language) ** 2)))
    return recipe.words().paragraph(rng, language, rng.randint(1, most))


def _covering_face(recipe: SynthesisRecipe, rng: random.Random, text: str, language: str) -> Face | None:
    """A font that has every glyph; None drops the whole paragraph, as the report does."""
    covering = faces_for(recipe.faces(language), text)
    return rng.choice(covering) if covering else None


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def _room(recipe: SynthesisRecipe, rng: random.Random, size: tuple[int, int]) -> tuple[int, int]:
    """The area that text is fitted to: a share of the canvas within a margin of 4 %."""
    share = rng.uniform(recipe.fill, 1.0)
    width, height = (side - 2 * max(1, round(0.04 * side)) for side in size)
    return int(width * share), int(height * share)


def _at(element: TextElement, x: int, y: int) -> TextElement:
    return dataclasses.replace(element, x=x, y=y)


def _upright(element: TextElement) -> TextElement:
    return dataclasses.replace(element, angle=0.0)


def fixed_caption(ground: Ground, texts: list[TextElement], language: str) -> str:
    """The short form that begins with the quoted text: `"CAT" in red above "DOG" in blue on a white ground`."""
    name, turn = ground.called(language), _turn(texts, language)
    if language == "zh":
        parts = [quote(t.text, "zh") + COLOURS[t.colour].chinese for t in texts]
        return "，下面".join(parts) + f"，{name}背景{turn}"
    parts = [f"{quote(t.text, 'en')} in {t.colour}" for t in texts]
    return " above ".join(parts) + f" on {article(name)} {name} ground{turn}"


def _natural_caption(rng: random.Random, ground: Ground, texts: list[TextElement], language: str) -> str:
    name, colours = ground.called(language), [COLOURS[t.colour].called(language) for t in texts]
    quotes = [quote(t.text, language) for t in texts]
    kind = "paragraph" if len(texts[0].lines) > 1 else "text"
    if language == "zh":
        kind = "段落" if kind == "paragraph" else ""
        shown = "，下方是".join(f"{colour}的{kind}{text}" for colour, text in zip(colours, quotes))
    elif len(set(colours)) == 1 and len(texts) > 1:
        shown = f"{colours[0]} text " + " above ".join(quotes)
    else:
        shown = " above ".join(f"{colour} {kind} {text}" for colour, text in zip(colours, quotes))
    a = article(name)
    return rng.choice(_NATURAL[language]).format(
        ground=name, texts=shown, turn=_turn(texts, language), a=a, A=a.capitalize()
    )


def _turn(texts: list[TextElement], language: str) -> str:
    angle = texts[0].angle
    if abs(angle) < 5:
        return ""
    if language == "zh":
        return "，逆时针倾斜" if angle > 0 else "，顺时针倾斜"
    return ", turned anticlockwise" if angle > 0 else ", turned clockwise"
