"""Fields of the recipes of `training/data` that change nothing, and why. They are said, not refused: a recipe may be
run in parts, with other stages at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from .collect import tables_of
from .filters.order import DUPLICATES, FILTER_NAMES, STAGE_OF
from .recipe import AnnotateRecipe, FilterRecipe, RetrieveRecipe, SourceRecipe

# The filters that read a field; one of them is enough.
_READ_BY = {
    "curation.min_bytes": ("file_size",), "curation.max_bytes": ("file_size",), "curation.min_side": ("resolution",),
    "curation.max_aspect": ("aspect_ratio",), "curation.duplicate_bits": ("near_duplicate",),
    "curation.max_nsfw": ("nsfw",),
    "quality.min_clarity": ("clarity",), "quality.min_luma": ("luma",), "quality.max_luma": ("luma",),
    "quality.max_saturation": ("saturation",), "quality.min_entropy": ("rgb_entropy", "near_duplicate"),
    "quality.max_texture": ("texture",),
    "captions.min_tokens": ("token_length",), "captions.max_tokens": ("token_length",),
    "captions.tokenizer": ("token_length",), "captions.min_new_words": ("invalid_caption",),
    "captions.min_alignment": ("alignment",), "captions.chinese_clip": ("alignment",),
    "captions.siglip": ("alignment",),
    "text.max_area": ("intensive_text",), "text.min_height": ("small_characters",),
    "refinement.min_side": ("refined_resolution",), "refinement.max_blockiness": ("image_quality",),
    "refinement.max_border": ("border",), "refinement.max_watermark": ("watermark",),
    "balance.max_mosaic": ("face_mosaic",), "balance.categories": ("category_balance",),
    "balance.tail": ("taxonomy",), "balance.power": ("taxonomy",), "balance.best_by": ("taxonomy",),
}  # fmt: skip
_NEED_ALL = (*DUPLICATES, "category_balance", "taxonomy")
_OF_THE_RESULT = ("sheet", "shard_records", "seed", "captions.sets")


def of_filters(
    recipe: FilterRecipe, start: FilterRecipe, *, engine: str = "local", training: bool = False
) -> Iterator[str]:
    """A sentence for each field that differs from `start`, the defaults or those of a preset, and changes nothing.

    Args:
        training: the filters judge one record at a time while training goes on, see `screen.Screen`.
    """
    running = {name for name in FILTER_NAMES if STAGE_OF[name] in recipe.stages and name not in recipe.without}
    if training:
        running -= {*_NEED_ALL}
    for name in sorted({*recipe.without} - {*start.without}):
        if STAGE_OF[name] not in recipe.stages:
            yield f"without: {name} has no effect: stage {STAGE_OF[name]} is not run"
    for name in _changed(dataclasses.asdict(recipe), dataclasses.asdict(start)):
        why = _why_not_in_training(name) if training else _why_not(name, recipe, running, engine)
        if why := why or _why_not_read(name, running, recipe):
            yield f"{name} has no effect: {why}"
    by = recipe.balance.best_by
    if "taxonomy" in running and recipe.balance.power < 1 and not training and by not in running:
        yield f"balance.best_by: {by} is not measured in this run, so who stays in a crowded node is drawn"


def of_annotation(recipe: AnnotateRecipe) -> Iterator[str]:
    """The same of `data annotate`."""
    if not recipe.endpoint:
        for name in _changed(dataclasses.asdict(recipe), dataclasses.asdict(AnnotateRecipe())):
            if name in ("api_key_file", "timeout"):
                yield f"{name} has no effect: without an endpoint, the model runs here"


def of_retrieval(recipe: RetrieveRecipe) -> Iterator[str]:
    """The same of `data retrieve`."""
    if recipe.by == "captions" and recipe.max_pixels != RetrieveRecipe.max_pixels:
        yield "max_pixels has no effect: with `by: captions`, no picture is decoded"


def of_sources(sources: Sequence[SourceRecipe]) -> Iterator[str]:
    """Columns that are asked for where there is no table. Raises what `collect.collect` does."""
    for number, source in enumerate(sources):
        if source.image_column != SourceRecipe.image_column:
            _, files = tables_of(source.path)
            if not any(file.name.lower().endswith((".parquet", ".jsonl", ".csv")) for file in files):
                yield f"sources.{number}.image_column has no effect: {source.path} has no table with columns"


def _changed(now: dict[str, Any], start: dict[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        if name in ("balance", "captions", "curation", "quality", "ray", "refinement", "text"):
            yield from (f"{name}.{inner}" for inner in _changed(value, start[name]))
        elif value != start[name] and name not in ("sources", "stages", "without"):
            yield name


def _why_not(name: str, recipe: FilterRecipe, running: set[str], engine: str) -> str:
    balance, words = recipe.balance, recipe.captions
    if name.startswith("ray.") and engine != "ray":
        return "the engine is not ray"
    if name in ("balance.tail", "balance.best_by") and "taxonomy" in running and balance.power == 1:
        return "balance.power is 1, which keeps all of every node"
    if name == "captions.min_alignment" and "alignment" in running and not (words.chinese_clip or words.siglip):
        return "there is no model, neither captions.chinese_clip nor captions.siglip"
    draws = bool(words.sets) or ("category_balance" in running and bool(balance.categories))
    if name == "seed" and not draws and not ("taxonomy" in running and balance.power < 1):
        return "nothing is drawn, for captions.sets, balance.categories or balance.power"
    return ""


def _why_not_in_training(name: str) -> str:
    if name in _OF_THE_RESULT or name.startswith("ray."):
        return "it is for `data filter`, which writes a result"
    if name in _READ_BY and {*_READ_BY[name]} <= {*_NEED_ALL}:
        return "it needs all records, as `data filter` has them"
    return ""


def _why_not_read(name: str, running: set[str], recipe: FilterRecipe) -> str:
    readers = _READ_BY.get(name, ())
    if not readers or running & {*readers}:
        return ""
    first = readers[0]
    return (
        f"{first} is in `without`"
        if first in recipe.without
        else f"{first} is of stage {STAGE_OF[first]}, which is not run"
    )
