"""Editing pairs from the same generator: the same drawing as a value, changed in one thing and rendered again."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from . import complex as complex_layouts
from . import compositional, scene_edits, vision
from .canvas import fit_size
from .colours import COLOURS, LEAST_CONTRAST, contrast, readable_on
from .edit_words import instruction_of
from .fonts import faces_for
from .generator import retried
from .recipe import SynthesisRecipe
from .sample import EditSample, quote


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
    return scene_edits.make_pair(recipe, rng, strategy, size, language)


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
        scene_edits.fill(mask, compositional.medium_box(source))
    (before, _), (after, _) = compositional.render(source), compositional.render(target)
    instruction = instruction_of(rng, kind, language, **words)
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
            scene_edits.fill(mask, box)
    instruction = instruction_of(rng, kind, language, **words)
    after_texts = tuple(slot.text for slot in target.slots)
    return EditSample(before, after, instruction, mask, kind, language, tuple(texts), after_texts, "complex")
