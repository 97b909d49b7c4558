"""The kinds of runs, by the name that a recipe has them by."""

from __future__ import annotations

from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.post import AwmRecipe, DpoRecipe, GrpoRecipe, NftRecipe, SftRecipe
from qwen_image_fast.training.recipe.run import RunRecipe
from qwen_image_fast.training.recipe.vae import VaeRecipe

KINDS: dict[str, type[RunRecipe]] = {
    "flow": FlowRecipe, "vae": VaeRecipe, "sft": SftRecipe, "dpo": DpoRecipe, "grpo": GrpoRecipe, "nft": NftRecipe,
    "awm": AwmRecipe,
}  # fmt: skip
