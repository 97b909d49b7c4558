"""From YAML to a checked recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_image_fast.training.recipe.fields import RecipeError, convert
from qwen_image_fast.training.recipe.fitted import read_fitted
from qwen_image_fast.training.recipe.kinds import KINDS
from qwen_image_fast.training.recipe.run import RunRecipe


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunRecipe:
    """The recipe in a YAML file, changed by overrides of the form "optimizer.lr=1e-3", values in YAML."""
    return build(read_fitted(path, overrides))


def build(tree: Any) -> RunRecipe:
    """The checked recipe of a nested dict. `kind` says which dataclass; every other key is a field of it."""
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe: the file must hold keys and values, got {type(tree).__name__}")
    kind = tree.get("kind", "flow")
    if kind not in KINDS:
        raise RecipeError(f"recipe: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    recipe = convert(tree, KINDS[kind], "")
    recipe.check()
    return recipe
