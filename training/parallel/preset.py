"""What a recipe changes to fit a card, by the same count as `--plan`, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen_image_fast.training.parallel.layout import Sizes
from qwen_image_fast.training.parallel.plan import Plan, frugal, in_fewer_bits, model_of, plan_of, small_base
from qwen_image_fast.training.recipe.curriculum import read_curriculum
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.fitted import CARDS, card
from qwen_image_fast.training.recipe.flow import FlowRecipe

SIDES = (768, 512)  # of smaller pictures, where those of the recipe do not fit
ANY_PEAK = 1e15  # operations per second: only memory is asked for


def preset_changes(path: Path, overrides: Sequence[str], name: str) -> tuple[list[str], str]:
    """Changes of a recipe that let it fit a card, and a sentence about them.

    The first that is enough of: none; one picture at a time and gradient checkpointing; and pictures of 768, 512 px;
    for adapters then the same with the base in 8 or 4 bits, where what is used once for a picture is read for it.

    Raises:
        RecipeError: there is no such preset, or nothing is enough; the sentence names a preset that is.
    """
    room = card(name)
    recipe = read_curriculum(path, overrides).stages[0].recipe
    if not isinstance(recipe, FlowRecipe):
        raise RecipeError(f"preset: --preset is for kind flow, this recipe is of kind {recipe.kind}")
    less = frugal(recipe)
    sizes = [[], *([f"data.buckets=[[{side}, {side}]]"] for side in SIDES)]
    tried = [[], *([*less, *size] for size in sizes)]
    for precision in in_fewer_bits(recipe):
        tried += [[*less, *small_base(precision, room), *size] for size in sizes]
    for changes in tried:
        plan = _alone(path, [*changes, *overrides])
        if plan.memory / 1e9 <= room:
            said = ", ".join(changes) or "the recipe as it is"
            return changes, f"{name}: {said}; about {plan.memory / 1e9:.1f} GB are needed, counted from sizes"
    needed = plan.memory / 1e9
    enough = [other for other, memory in CARDS.items() if needed <= memory]
    would = f"--preset {enough[0]} would" if enough else "no preset would"
    parts = f"{plan.states / 1e9:.1f} the transformer, {plan.frozen / 1e9:.1f} condition encoder, VAE and CUDA"
    raise RecipeError(
        f"preset: {name} cannot hold this run, which needs {needed:.1f} GB at least ({parts}): {would}; several cards "
        "share the transformer (--plan)"
    )


def _alone(path: Path, overrides: Sequence[str]) -> Plan:
    """The plan on a single card."""
    recipe = read_curriculum(path, overrides).stages[0].recipe
    assert isinstance(recipe, FlowRecipe)  # looked at before
    return plan_of(recipe, model_of(recipe), Sizes(1, 1, 1, 1), ANY_PEAK)
