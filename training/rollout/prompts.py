"""Prompts of a round: which ones, from where; functions of (seed, round). They are what producers make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.training.batches.batches import FlowBatches, to_buckets
from qwen_image_fast.training.randomness import epoch_position, key
from qwen_image_fast.training.recipe.curriculum import Change
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.post import PostRecipe
from qwen_image_fast.training.rewards.make import make_rewards
from qwen_image_fast.training.rewards.reward import Asked, Reward, asked_of, language_of
from qwen_image_fast.training.sources.lines import PromptLine, digest, pair_lines, prompt_lines
from qwen_image_fast.training.synthesis.sample import EditSample, Sample, quoted_texts


@dataclass
class Prompt:
    """size: height and width of its pictures in pixels. references: of an edit, uint8 [H, W, 3]."""

    asked: Asked
    size: tuple[int, int]
    references: list[np.ndarray] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    @property
    def caption(self) -> str:
        return self.asked.prompt


class Prompts(list[Prompt]):
    """What a micro-batch of a step begins with: the prompts of a round at its first step, else none."""

    step: int = 0
    micro: int = 0

    @property
    def rejected(self) -> list[tuple[int | None, str, str]]:
        return [(number, *why) for number, prompt in enumerate(self) for why in prompt.rejected]


class PromptBatches:
    """Makes the prompts of a stage's rounds.

    Args:
        source: of captions and edits; None: the recipe names a file of prompts. first: step at which the stage begins.
    """

    def __init__(self, recipe: PostRecipe, source: FlowBatches | None, first: int = 0):
        self.recipe, self.source, self.first = recipe, source, first
        named = recipe.rollout.prompts
        self.lines, self.read = (prompt_lines(named), {named: digest(named)}) if named else ([], {})
        held = min(recipe.guards.count, len(self.lines) // 2) if recipe.guards.every else 0
        # The last prompts of a file are looked at and never trained on.
        self.trained, self.held = self.lines[: len(self.lines) - held], self.lines[len(self.lines) - held :]

    def use(self, changes: Sequence[Change]) -> None:
        if self.source is not None:
            self.source.use(changes)

    def batch(self, step: int, micro: int) -> Prompts:
        number, into = divmod(step - self.first, self.recipe.rollout.updates)
        found = Prompts() if into or micro else Prompts(self.round(number))
        found.step, found.micro = step, micro
        return found

    def round(self, number: int) -> list[Prompt]:
        """Those of a round of the stage."""
        count = self.recipe.rollout.count
        # Of several stages each has others.
        seed = key(self.recipe.seed, "prompts", self.first) % 2**31
        return [self._prompt(seed, number * count + place) for place in range(count)]

    def held_out(self) -> list[Prompt]:
        """The prompts that are looked at, the same ones in every round."""
        if self.lines:
            return [self.prompt_of(line) for line in self.held]
        assert self.source is not None
        seed = self.source.validation_seed
        return [self._drawn(seed, place) for place in range(self.recipe.guards.count)]

    def _prompt(self, seed: int, place: int) -> Prompt:
        if self.lines:
            return self.prompt_of(self.trained[epoch_position(seed, place, len(self.trained))])
        return self._drawn(seed, place)

    def prompt_of(self, line: PromptLine) -> Prompt:
        height, width = self.recipe.data.sizes[0]
        texts = quoted_texts(line.prompt) if line.texts is None else line.texts
        asked = Asked(line.prompt, texts, language_of(texts), line.colours, line.boxes, fields=line.fields)
        return Prompt(asked, (height, width))

    def _drawn(self, seed: int, place: int) -> Prompt:
        assert self.source is not None
        _, sample, rejected, _ = self.source.drawn(seed, place)
        images, _ = to_buckets([sample.image, *sample.references], self.recipe.data)
        drawn: Sample | EditSample | None = sample.drawn
        if images[0].shape != sample.image.shape:  # boxes and targets are of another size then
            drawn = None
        return Prompt(asked_of(sample.caption, drawn), images[0].shape[:2], list(images[1:]), rejected)


def check_collecting(recipe: PostRecipe, folder: Path, say: Callable[[str], Any] = lambda sentence: None) -> None:
    """What can be known of pairs, prompts and rewards before a model is loaded. folder: of the run. say: is told how
    often a prompt is drawn, where a file has fewer than a round draws.

    Raises:
        RecipeError: a line of a file is wrong, or a reward cannot judge pictures of a prompt.
    """
    if recipe.pairs:
        edits = [pair for pair in pair_lines(recipe.pairs, both=recipe.kind == "dpo") if pair.references]
        if edits and not recipe.data.tasks.get("ti2i"):
            raise RecipeError(
                f"recipe: data.tasks must be {{ti2i: 1}}: line {edits[0].number} of {recipe.pairs} has references"
            )
        return
    rewards = make_rewards(recipe.rewards, folder)
    if recipe.rollout.prompts:
        made, count = PromptBatches(recipe, None), recipe.rollout.count
        if len(made.trained) < count:
            held = f", beside {len(made.held)} that are only looked at" if made.held else ""
            say(f"{recipe.rollout.prompts} has {len(made.trained)} prompts to learn from{held}; a round draws {count} "
                "(rollout.count), so some are drawn more than once, from other noise")  # fmt: skip
        for line in made.lines:
            check_asked(rewards, made.prompt_of(line).asked)


def check_asked(rewards: Sequence[Reward], asked: Asked) -> None:
    """RecipeError where a reward cannot judge pictures of a prompt."""
    for reward in rewards:
        if why := reward.refuses(asked):
            raise RecipeError(f"recipe: rewards: {why}; there is the prompt {asked.prompt!r:.80}")
