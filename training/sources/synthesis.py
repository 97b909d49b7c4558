"""Pictures that are drawn: rendered text and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from qwen_image_fast.training.data.screen import Rejected
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.sample import Sample
from qwen_image_fast.training.synthesis.editing import make_edit
from qwen_image_fast.training.synthesis.generator import MOST_ATTEMPTS, Undrawable, make
from qwen_image_fast.training.synthesis.photos import UnreadablePhoto
from qwen_image_fast.training.synthesis.recipe import SynthesisRecipe, tiny

Made = TypeVar("Made")


class Synthesis:
    """Rendered text and shapes of `training.synthesis`.

    Args:
        preset: "tiny": `options` are the arguments of `synthesis.recipe.tiny`; "": the fields of a `SynthesisRecipe`.
    """

    def __init__(self, preset: str = "", **options: Any):
        if preset not in ("", "tiny"):
            raise RecipeError(f"recipe: data.options.preset must be tiny or empty, got {preset!r}")
        self.recipe = tiny(**options) if preset else SynthesisRecipe.from_dict(options)

    def check_effect(self, edits: bool) -> None:
        """RecipeError for options of strategies that are not drawn. edits: pairs are drawn, too."""
        recipe = self.recipe
        changes = {
            "arranged": ("shapes", recipe.shapes),
            "kinds": ("shapes", recipe.shapes or (edits and recipe.pure)),
            "photos": ("compositional", recipe.compositional),
            "vision": ("scenes", recipe.scenes),
        }
        for name, (strategy, weight) in changes.items():
            if not weight and getattr(recipe, name) != getattr(SynthesisRecipe, name):
                raise RecipeError(
                    f"recipe: data.options.{name} has no effect where data.options.{strategy} is 0: leave it out, or "
                    f"give {strategy} a weight"
                )

    def sample(self, seed: int, index: int) -> Sample:
        made = _drawn(make, self.recipe, seed, index)
        return Sample(made.image, made.caption, drawn=made)

    def edit(self, seed: int, index: int) -> Sample:
        made = _drawn(make_edit, self.recipe, seed, index)
        return Sample(made.target, made.instruction, (made.source,), drawn=made)


def _drawn(draw: Callable[[SynthesisRecipe, int, int], Made], recipe: SynthesisRecipe, seed: int, index: int) -> Made:
    try:
        return draw(recipe, seed, index)
    except UnreadablePhoto as error:
        raise Rejected(error.path, f"broken_file: {error.reason}") from error
    except Undrawable as error:
        raise Rejected(f"sample {index} of the synthesis", f"undrawable: {error}", MOST_ATTEMPTS) from error
