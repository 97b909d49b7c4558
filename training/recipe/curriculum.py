"""A run of several stages in one process: a recipe with a list `stages`.

Every field at the top of the file holds in all stages, and a field of a stage in that one. A stage has further a name
and `carry`, and may be of another kind than the others: flow, then dpo, then grpo is one run. Model, seed and device
are those of the whole run. What a stage begins with: the weights of the one before always, the optimiser's state and
the average as `carry` says. The learning rate's schedule begins anew in each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_image_fast.training.recipe.fields import RecipeError, convert, merged
from qwen_image_fast.training.recipe.fitted import read_fitted
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.kinds import KINDS
from qwen_image_fast.training.recipe.read import build
from qwen_image_fast.training.recipe.run import RunRecipe

# One for the run, so not a stage's own.
_OF_THE_RUN = ("kind", "seed", "device", "reference_ops", "lora", "producers", "folder", "mode", "base_dim")


@dataclass(frozen=True)
class Change:
    """From this step on (until the end of its stage) the parts of the mixture have these weights."""

    step: int
    weights: tuple[tuple[str, float], ...]


@dataclass
class Carry:
    """What a stage takes over from the one before: the optimiser's state, the average of the weights."""

    optimizer: bool = True
    ema: bool = True


@dataclass
class Stage:
    """first: its first step in the run; last: the step after which it is over."""

    name: str
    recipe: RunRecipe
    carry: Carry
    first: int

    @property
    def last(self) -> int:
        return self.first + self.recipe.steps


@dataclass
class Curriculum:
    """A run. A plain recipe is a run of one stage."""

    name: str
    stages: list[Stage] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.stages[-1].last

    def number(self, step: int) -> int:
        """Of the stage in which update `step`, counted from 0, is made."""
        return next((k for k, stage in enumerate(self.stages) if step < stage.last), len(self.stages) - 1)

    def first_sample(self, number: int) -> int:
        return sum(s.recipe.steps * s.recipe.accumulate * s.recipe.batch for s in self.stages[:number])

    def sample_of(self, step: int) -> int:
        """Number of the first sample of a step."""
        k = self.number(step)
        stage = self.stages[k]
        return self.first_sample(k) + (step - stage.first) * stage.recipe.accumulate * stage.recipe.batch

    def weights(self, step: int, changes: Sequence[Change] = ()) -> dict[str, float]:
        """Of the mixture's parts at a step."""
        stage = self.stages[self.number(step)]
        now = {part.name: part.weight for part in stage.recipe.data.parts}
        for change in changes:
            if stage.first <= change.step <= step:
                now = {**now, **{name: w for name, w in change.weights if name in now}}
        return now

    def described(self) -> dict[str, Any]:
        """For a checkpoint: everything that decides what the run does, so without who makes its batches."""
        described = []
        for stage in self.stages:
            tree = dataclasses.asdict(stage.recipe)
            del tree["producers"]
            described.append(tree if len(self.stages) == 1 else {**tree, "carry": dataclasses.asdict(stage.carry)})
        return described[0] if len(described) == 1 else {"stages": described}


def one_stage(recipe: RunRecipe) -> Curriculum:
    return Curriculum(recipe.name, [Stage(recipe.name, recipe, Carry(), 0)])


def read_curriculum(path: str | Path, overrides: Sequence[str] = ()) -> Curriculum:
    """The run of a YAML file, changed by overrides such as "optimizer.lr=1e-3" or "stages.0.steps=20".

    Raises:
        RecipeError: a sentence about the field that is unknown, of a wrong type or impossible.
    """
    return build_curriculum(read_fitted(path, overrides))


def build_curriculum(tree: Any) -> Curriculum:
    if not isinstance(tree, dict) or "stages" not in tree:
        return one_stage(build(tree))
    common = {name: value for name, value in tree.items() if name != "stages"}
    if not isinstance(tree["stages"], list) or not tree["stages"]:
        raise RecipeError(f"recipe: stages must be a list of one stage or more, got {tree['stages']!r}")
    run = Curriculum(str(common.get("name", "run")))
    for number, own in enumerate(tree["stages"]):
        try:
            run.stages.append(_stage(common, own, number, run.steps if number else 0))
        except RecipeError as error:
            raise RecipeError(f"{error} (stage {number})") from error
        _check(run.stages[0].recipe, run.stages[-1], number, run.stages[number - 1].recipe if number else None)
    return run


def _stage(common: dict[str, Any], own: Any, number: int, first: int) -> Stage:
    if not isinstance(own, dict):
        raise RecipeError(f"recipe: a stage must hold fields, got {own!r}")
    own = dict(own)
    carry = convert(own.pop("carry", {}), Carry, "carry")
    name = str(own.pop("name", f"stage {number}"))
    kinds = [KINDS.get(str(name), RunRecipe) for name in (common.get("kind", "flow"), own.get("kind", "flow"))]
    shared = all(issubclass(kind, FlowRecipe) for kind in kinds)  # flow, and what comes after it
    for field_name in _OF_THE_RUN:
        if field_name in own and not (field_name == "kind" and shared):
            raise RecipeError(f"recipe: {field_name} must stand above the stages: it is one for the whole run")
    kind = KINDS.get(own.get("kind", common.get("kind", "flow")), RunRecipe)
    return Stage(name, build(merged(common, own, kind) | {"name": name}), carry, first)


def _check(first: RunRecipe, stage: Stage, number: int, before: RunRecipe | None) -> None:
    if before is None:
        return
    if stage.recipe.optimizer.masters != first.optimizer.masters:
        raise RecipeError(f"recipe: optimizer.masters must be the same in all stages (stage {number})")
    free = {"gradient_checkpointing", "max_text_tokens"}
    models = [dataclasses.asdict(recipe).get("model", {}) for recipe in (stage.recipe, first)]
    if changed := [name for name in models[0] if name not in free and models[0][name] != models[1][name]]:
        raise RecipeError(
            f"recipe: model.{changed[0]} must stand above the stages: it is one for the run (stage {number})"
        )
    if stage.carry.optimizer and before.optimizer.name != stage.recipe.optimizer.name:
        raise RecipeError(
            f"recipe: carry.optimizer must be false where optimizer.name changes, here from {before.optimizer.name} to "
            f"{stage.recipe.optimizer.name} (stage {number})"
        )
