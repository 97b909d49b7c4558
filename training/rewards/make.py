"""From the rewards of a recipe to what gives them."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.rewards import RewardRecipe
from qwen_image_fast.training.rewards.judge import Judge
from qwen_image_fast.training.rewards.pixels import Colour, Layout
from qwen_image_fast.training.rewards.reward import Asked, Reward, RewardError
from qwen_image_fast.training.rewards.texts import Edit, Text


class Function:
    """A Python function of the user's: f(pictures, asked) -> a number for each; RewardError where it raises."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.where, self.function = name, name, function

    def refuses(self, asked: Asked) -> str | None:
        return None

    def __call__(self, pictures: Sequence[np.ndarray], asked: Sequence[Asked]) -> Sequence[float]:
        try:
            return self.function(list(pictures), list(asked))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} (line {at.lineno} of {at.filename})"
            raise RewardError(f"reward function: {self.where} raised {what}; mend it, then resume") from error


def make_reward(recipe: RewardRecipe, folder: Path | None = None) -> Reward:
    """The reward of a recipe. folder: of the run.

    Raises:
        RecipeError: there is no such function, or no file with a judge's key.
    """
    settings = recipe.settings()
    if recipe.kind == "function":
        return Function(settings.name, function_of(settings.name))
    made: dict[str, Callable[[], Any]] = {
        "text": lambda: Text(settings), "colour": Colour, "layout": Layout, "edit": Edit,
        "judge": lambda: Judge(settings, folder),
    }  # fmt: skip
    return made[recipe.kind]()


def make_rewards(recipes: Sequence[RewardRecipe], folder: Path | None = None) -> list[Reward]:
    """Those of a run, each with a name of its own."""
    rewards = [make_reward(recipe, folder) for recipe in recipes]
    names = [reward.name for reward in rewards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"recipe: rewards must each be another one, got {twice[0]} twice")
    return rewards


def function_of(name: str) -> Callable[..., Any]:
    """What "package.module:function" names; RecipeError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise RecipeError(f"recipe: rewards: there is no module {module} ({error})") from error
    except AttributeError as error:
        raise RecipeError(f"recipe: rewards: the module {module} has no {attribute}") from error
    if not callable(found):
        raise RecipeError(f"recipe: rewards: {name} must be a function, got {type(found).__name__}")
    return found
