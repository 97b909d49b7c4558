"""What is watched while rewards drive a run, and when it is stopped: a reward can be had in ways nobody wants.

Looks are pictures of held-out prompts that never change. Edge density and colour entropy fall when a reward for text
blanks the scene: dark pixels from 45 to 93 %, 60 % fewer edges, half the colours in 100 rounds were reported for a
reward by OCR without an anchor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_image_fast.training.recipe.rewards import GuardsRecipe
from qwen_image_fast.training.tasks.task import StopRun


def edge_density(picture: np.ndarray) -> float:
    """Share of neighbouring pixels whose brightness differs by more than 24 of 255; uint8 [H, W, 3]."""
    grey = picture.astype(np.float64).mean(2)
    return float(np.mean([(np.abs(np.diff(grey, axis=axis)) > 24).mean() for axis in (0, 1)]))


def colour_entropy(picture: np.ndarray) -> float:
    """Bits of the distribution over 8 x 8 x 8 colours."""
    cells = (picture.astype(int) // 32) @ np.array([64, 8, 1])
    shares = np.bincount(cells.ravel(), minlength=512) / cells.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def measured(pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Means over pictures."""
    return {
        "held_out_edges": float(np.mean([edge_density(p) for p in pictures])),
        "held_out_entropy": float(np.mean([colour_entropy(p) for p in pictures])),
        "held_out_brightness": float(np.mean([p.mean() / 255 for p in pictures])),
    }


class Guards:
    """Counts how long a value has been where it should not be.

    Args:
        recipe: of the stage.
    """

    def __init__(self, recipe: GuardsRecipe):
        self.recipe = recipe
        self.first: dict[str, float] = {}  # of the first look
        self.counts: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "counts": self.counts}

    def load(self, state: Mapping[str, Any]) -> None:
        self.first, self.counts = dict(state["first"]), dict(state["counts"])

    def round(self, values: Mapping[str, float]) -> list[str]:
        """Of the share of dead groups of a round: what is wrong, if a run goes on all the same.

        Raises:
            StopRun: as all that follow, where `guards.stop` holds and something was wrong `patience` times in a row.
        """
        recipe, share = self.recipe, values["dead_groups"]
        wrong = recipe.dead > 0 and share > recipe.dead
        what = (
            f"{share:.0%} of the prompts have pictures of one reward, more than guards.dead, {recipe.dead:.0%}: "
            "take other prompts"
        )
        return self._after("dead", wrong, what)

    def look(self, values: Mapping[str, float]) -> list[str]:
        """Of the pictures of held-out prompts, and of the distance from the reference."""
        recipe = self.recipe
        for name, value in values.items():
            self.first.setdefault(name, value)
        found = []
        limits = {"held_out_edges": recipe.edges, "held_out_entropy": recipe.entropy}
        for name, most in limits.items():
            begin, now = self.first[name], values[name]
            field, said = (
                name.removeprefix("held_out_"),
                name.removeprefix("held_out_").replace("edges", "edge density"),
            )
            what = (
                f"the {said} of held-out pictures fell from {begin:.3g} to {now:.3g}, by more than guards.{field}, "
                f"{most:.0%}: the reward may be had by emptying the picture"
            )
            found += self._after(field, most > 0 and now < (1 - most) * begin, what)
        begin, now = self.first["held_out_reward"], values["held_out_reward"]
        what = (
            f"the reward of held-out prompts fell from {begin:.3f} to {now:.3f}, by more than guards.held_out, "
            f"{recipe.held_out:g}: lower optimizer.lr, or stop here"
        )
        found += self._after("held_out", recipe.held_out > 0 and now < begin - recipe.held_out, what)
        drift = values["drift"]
        what = (
            f"the model has drifted from where it began by {drift:.3g} of its velocity's square, more than "
            f"guards.drift, {recipe.drift:g}: lower optimizer.lr or raise the anchor"
        )
        return found + self._after("drift", 0 < recipe.drift < drift, what)

    def update(self, values: Mapping[str, float]) -> list[str]:
        """Of an update's loss."""
        recipe, found = self.recipe, []
        if "clipped" in values:
            what = (
                f"{values['clipped']:.0%} of the ratios are clipped, more than guards.clipped, {recipe.clipped:.0%}: "
                "lower optimizer.lr or rollout.updates"
            )
            found += self._after("clipped", 0 < recipe.clipped < values["clipped"], what)
        if "delta_chosen" in values:
            worse = values["delta_chosen"] > 0 and values["delta_rejected"] > 0
            what = (
                f"both pictures of the pairs got worse in {recipe.unlearning} updates in a row: raise sft_weight or "
                "beta, or lower optimizer.lr"
            )
            found += self._after("unlearning", worse and recipe.unlearning > 0, what, recipe.unlearning)
        return found

    def _after(self, name: str, wrong: bool, what: str, patience: int = 0) -> list[str]:
        """The sentence where something has just been wrong for `patience` times in a row."""
        self.counts[name] = self.counts.get(name, 0) + 1 if wrong else 0
        if self.counts[name] < (patience or self.recipe.patience) or not wrong:
            return []
        if self.recipe.stop:
            raise StopRun(f"{what} (guards.stop=false goes on)")
        return [what] if self.counts[name] == (patience or self.recipe.patience) else []
