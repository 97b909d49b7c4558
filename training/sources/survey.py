"""All sources of a run, made and looked at before a model is loaded, and what there is to say about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from qwen_image_fast.training.recipe.curriculum import Curriculum, Stage
from qwen_image_fast.training.recipe.data import DataRecipe, part_key
from qwen_image_fast.training.recipe.vae import VaeRecipe
from qwen_image_fast.training.sources.cropping import cuts_of, left_out, sentences, small, write_table
from qwen_image_fast.training.sources.examples import Examples
from qwen_image_fast.training.sources.make import make_sources
from qwen_image_fast.training.sources.sample import Source


def sources_of(run: Curriculum) -> dict[str, Source]:
    """The sources of all stages by `part_key`. A run on cached latents that names no source has none."""
    first = run.stages[0].recipe.data
    if first.cache and first.source == DataRecipe.source:
        return {}
    return make_sources([p for stage in run.stages if stage.recipe.names_data for p in stage.recipe.data.parts])


def named_by(run: Curriculum, sources: dict[str, Source]) -> set[str]:
    """Files of which `said_of` says, by name or by their number, that they will be left out."""
    found = set()
    for stage in run.stages:
        for part in stage.recipe.data.parts:
            source = sources.get(part_key(part))
            if isinstance(source, Examples):
                found |= {seen.origin for seen in source.seen if seen.fault}
                found |= {origin for origin, _ in small(source, _data(stage))}
    return found


def _data(stage: Stage) -> DataRecipe:
    """What a stage learns from; kind vae, whose batches have one size, enlarges small pictures always."""
    data = stage.recipe.data
    return dataclasses.replace(data, upscale=True) if isinstance(stage.recipe, VaeRecipe) else data


def said_of(run: Curriculum, sources: dict[str, Source], folder: Path) -> Iterator[str]:
    """Sentences about the pictures of a run: what there is, at which sizes they are trained, and what is lost. Writes
    the table of all of them into the run's folder."""
    files = {key: source for key, source in sources.items() if isinstance(source, Examples)}
    for source in files.values():
        yield from source.said()
    stages, said = [], set()
    for stage in run.stages:
        data = _data(stage)
        too_small = [
            about for part in data.parts if (key := part_key(part)) in files for about in left_out(files[key], data)
        ]
        cuts = [cut for part in data.parts if (key := part_key(part)) in files for cut in cuts_of(files[key], data)]
        stages.append((stage.name, cuts))
        for sentence in [*too_small, *sentences(cuts, data)]:
            if sentence not in said:
                said.add(sentence)
                yield sentence if len(run.stages) == 1 else f"{stage.name}: {sentence}"
    if files:
        yield f"every picture and what is cut off of it: {write_table(folder, stages)}"
    masked = any(seen.masked for source in files.values() for seen in source.seen)
    if any(stage.recipe.data.mask_floor for stage in run.stages) and not masked:
        yield "data.mask_floor has no effect: no picture has a mask"
    validates = any(stage.recipe.log.validate_every for stage in run.stages)
    if validates and len(files) == len(sources) and not any(source.held_places for source in files.values()):
        yield (
            "no picture is held out, so there is no validation loss: data.hold_out is a share, rounded down, such as "
            "data.hold_out=0.1 of ten pictures"
        )
