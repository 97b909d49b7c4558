"""Sample pictures of a run: what its model draws now, of the same prompts and edits at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.model_defaults import generation_of, model_class
from qwen_image_fast.request import KINDS
from qwen_image_fast.training.batches.batches import FlowBatches
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.sources.buckets import fit
from qwen_image_fast.training.tasks.task import Drawn


def sampling(recipe: FlowRecipe, folder: Path) -> dict[str, Any]:
    """Size, steps and guidance: those of the recipe, else what the model in `folder` makes best."""
    height, width = recipe.data.sizes[0]
    log, usual = recipe.log, KINDS["text"].model_fields
    own = generation_of(folder, model_class(folder, str(folder)))
    guidance = log.guidance or own.cfg or usual["cfg"].default
    negative = {"negative_prompt": usual["negative_prompt"].default} if guidance > 1 else {}
    steps = log.sample_steps or own.steps or usual["steps"].default
    return {"height": height, "width": width, "num_inference_steps": steps, "true_cfg_scale": guidance, **negative}


def samples(
    recipe: FlowRecipe, batches: FlowBatches, pipe: Any, edit_pipe: Any, call: dict[str, Any]
) -> tuple[list[Drawn], list[tuple[None, str, str]]]:
    """Pictures of the recipe's prompts, or of held-out captions, and held-out edits; origin and reason of the samples
    that could not be used for them.

    Args:
        edit_pipe: None where the run has no edits. call: of `sampling`.
    """
    log, drawn = recipe.log, []
    call = {**call, "seed": recipe.seed, "output_type": "np", "progress": False}
    if prompts := log.prompts or _held_out_captions(batches, log.sample_count):
        made = pipe(prompts, **call).images
        drawn = [Drawn(prompt, [_pixels(image)]) for prompt, image in zip(prompts, made)]
    if edit_pipe is None:
        return drawn, []
    pairs, rejected = batches.edits(len(log.prompts) or log.sample_count)
    if pairs:
        references = [list(pair.references) for pair in pairs]
        made = edit_pipe(references, [pair.caption for pair in pairs], **call).images
        size = (call["height"], call["width"])
        drawn += [
            Drawn(pair.caption, [*(fit(picture, size) for picture in pair.references), _pixels(image)])
            for pair, image in zip(pairs, made)
        ]
    return drawn, [(None, *why) for why in rejected]


def _held_out_captions(batches: FlowBatches, count: int) -> list[str]:
    """Of the first held-out samples that are pictures from text, each once; of others where none is held out."""
    raw = [batches.sample(batches.validation_seed, 0, i, sigma=0.5) for i in range(count)]
    return list(dict.fromkeys(sample.caption for sample in raw if sample.task == "t2i"))


def _pixels(image: np.ndarray) -> np.ndarray:
    return (image * 255).round().astype(np.uint8)
