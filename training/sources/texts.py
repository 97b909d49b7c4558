"""The caption that a picture has this time: a function of (seed, index)."""

from __future__ import annotations

import numpy as np

from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.randomness import generator
from qwen_image_fast.training.recipe.captions import PLACE, CaptionsRecipe


def caption_of(record: Record, recipe: CaptionsRecipe, seed: int, index: int) -> str:
    """The caption of a record at a place of the stream; "" where it has none and the recipe gives none."""
    draws = generator(seed, "caption", sample=index)
    text = _chosen(record, recipe, draws)
    if text and (recipe.shuffle or recipe.drop):
        text = _parts(text, recipe, draws)
    return with_trigger(text or recipe.default, recipe.trigger)


def plain_caption(record: Record, recipe: CaptionsRecipe) -> str:
    """The same without chance, for validation: the best caption, whole and in its order."""
    lines = _lines(record.caption) if recipe.lines else []
    return with_trigger(lines[0] if lines else record.caption.strip() or recipe.default, recipe.trigger)


def with_trigger(text: str, trigger: str) -> str:
    if not trigger:
        return text
    if PLACE in text:
        return text.replace(PLACE, trigger)
    return f"{trigger}, {text}" if text else trigger


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _chosen(record: Record, recipe: CaptionsRecipe, draws: np.random.Generator) -> str:
    captions, weights = record.captions, recipe.weights
    if recipe.lines and "raw" in captions and not weights:
        captions = {str(number): line for number, line in enumerate(_lines(captions["raw"]), 1)}
    if not weights and "1" in captions:  # a list
        own = record.metadata.get("caption_weights", {})
        weights = {kind: own.get(kind, 1.0) for kind in captions}
    if not weights or sum(weights.values()) <= 0:
        return record.caption.strip()
    kinds, total = list(weights), sum(weights.values())
    kind = str(draws.choice(kinds, p=[weights[name] / total for name in kinds]))
    text = captions.get(kind, record.caption).strip()
    lines = _lines(text) if recipe.lines else []
    return str(draws.choice(lines)) if lines else text


def _parts(text: str, recipe: CaptionsRecipe, draws: np.random.Generator) -> str:
    """Shuffled and thinned out behind the first `keep` parts; one part stays at least."""
    parts = [part.strip() for part in text.split(recipe.separator.strip()) if part.strip()]
    first, rest = parts[: recipe.keep], parts[recipe.keep :]
    kept = [part for part, draw in zip(rest, draws.random(len(rest))) if draw >= recipe.drop]
    if recipe.shuffle:
        kept = [kept[place] for place in draws.permutation(len(kept))]
    joined = [*first, *kept] or parts[:1]
    return f"{recipe.separator.strip()} ".join(joined)
