"""Pictures that are drawn: rendered text and shapes."""

from __future__ import annotations

from typing import Any

from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.sample import Sample
from qwen_image_fast.training.synthesis.editing import make_edit
from qwen_image_fast.training.synthesis.generator import make
from qwen_image_fast.training.synthesis.recipe import SynthesisRecipe, tiny


class Synthesis:
    """Rendered text and shapes of `training.synthesis`.

    Args:
        preset: "tiny": `options` are the arguments of `synthesis.recipe.tiny`; "": the fields of a `SynthesisRecipe`.
    """

    def __init__(self, preset: str = "", **options: Any):
        if preset not in ("", "tiny"):
            raise RecipeError(f"recipe: data.options.preset must be tiny or empty, got {preset!r}")
        self.recipe = tiny(**options) if preset else SynthesisRecipe.from_dict(options)

    def sample(self, seed: int, index: int) -> Sample:
        made = make(self.recipe, seed, index)
        return Sample(made.image, made.caption)

    def edit(self, seed: int, index: int) -> Sample:
        made = make_edit(self.recipe, seed, index)
        return Sample(made.target, made.instruction, (made.source,))
