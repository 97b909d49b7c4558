"""Short runs of what comes after training, on the small model: coloured squares, rewarded by a function of pixels."""

import numpy as np
from trainer_helpers import small_recipe

from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.recipe.curriculum import one_stage
from qwen_image_fast.training.sources.survey import sources_of
from qwen_image_fast.training.tasks.post import PostTask

BRIGHT = [{"kind": "function", "options": {"name": "post_helpers:bright"}}]
# What each kind is tested with beside what all have.
KINDS = {
    "sft": {"best": 1, "least": -1e9},
    "dpo": {"margin": 0.0},
    "grpo": {"window": 2, "within": 2, "kl": 0.1},
    "nft": {"levels": 2},
    "awm": {"self_anchor": 1.0, "anchor": 0.01},
}


def bright(pictures, asked):
    """The mean of a picture: any two differ."""
    assert len(pictures) == len(asked)
    return [float(np.mean(picture)) for picture in pictures]


def post_recipe(folder, kind, /, **changes):
    """Two rounds of three updates, four prompts of three pictures each."""
    common = {
        "kind": kind, "steps": 6, "batch": 3, "model__train_text_encoder": False, "optimizer__ema": 0.0,
        "optimizer__lr": 1e-3, "rewards": BRIGHT, "guards": {"every": 0}, "rollout__count": 4, "rollout__group": 3,
        "rollout__updates": 3, "rollout__steps": 3, "data__text_dropout": 0.0,
    }  # fmt: skip
    return small_recipe(folder, **{**common, **KINDS[kind], **changes})


def post_task(recipe, folder):
    return PostTask(recipe, folder, sources=sources_of(one_stage(recipe)))


def start_post(recipe, folder, **options):
    return Trainer(recipe, post_task(recipe, folder), folder, **options)
