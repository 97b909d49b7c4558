"""From what was collected to a loss: which pictures at which noise, and what of the reference and the old policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.training.batches.noise import noise_level
from qwen_image_fast.training.randomness import generator, normal
from qwen_image_fast.training.recipe.post import (
    AwmRecipe,
    DpoRecipe,
    ForwardRecipe,
    GrpoRecipe,
    NftRecipe,
    PostRecipe,
    SftRecipe,
)
from qwen_image_fast.training.rollout.draw import velocity_of
from qwen_image_fast.training.tasks import losses
from qwen_image_fast.training.tasks.collected import Round
from qwen_image_fast.training.tasks.flops import step_flops
from qwen_image_fast.training.tasks.policies import Policies
from qwen_image_fast.training.tasks.task import Losses
from qwen_image_fast.training.velocity import FlowSample, interpolated, velocities, velocity_errors


class Learning:
    """The losses of a stage.

    Args:
        policies: copies of the weights, those of `recipe.policies` kept before the first update.
    """

    def __init__(self, transformer: Any, policies: Policies, recipe: PostRecipe):
        self.transformer, self.policies, self.recipe = transformer, policies, recipe

    def pairs(self, samples: Sequence[FlowSample], texts: Sequence[Tensor]) -> Losses:
        """DPO of pairs, chosen and rejected in turn, each pair with one noise and level."""
        recipe = self.recipe
        assert isinstance(recipe, DpoRecipe)
        noisy = interpolated(samples)
        with self.policies.use(recipe.compared):
            before = velocity_errors(velocities(self.transformer, samples, noisy, texts), samples)
        errors = velocity_errors(velocities(self.transformer, samples, noisy, texts), samples)
        found, extra = losses.dpo(errors, before, recipe.beta)
        if recipe.sft_weight:
            found = found + recipe.sft_weight * errors[::2]
        return self._losses(found, samples[::2], samples, texts, extra, 4)

    def from_round(self, made: Round, step: int, place: int) -> Losses:
        """Of the micro-batch that begins with unit `place` of a round's endless order.

        Where the round has nothing to learn from, as all pictures of each prompt are alike, the gradient is 0.
        """
        recipe = self.recipe
        units = self._taken(made, place)
        if not units:
            nothing = sum((p.sum() for p in self.policies.parameters.values()), torch.zeros(())) * 0.0
            return Losses(nothing, nothing.detach()[None], 0, {})
        if isinstance(recipe, GrpoRecipe):
            return self._grpo(made, units)
        if isinstance(recipe, DpoRecipe):
            pairs = [s for n, unit in enumerate(units) for s in self._samples(made, unit, step, place + n, 0)]
            return self.pairs(pairs, [made.conditions[made.pictures[i].prompt].text for unit in units for i in unit])
        numbers = [unit[0] for unit in units]
        levels = recipe.levels if isinstance(recipe, ForwardRecipe) else 1
        shared = isinstance(recipe, ForwardRecipe) and recipe.shared
        samples = [
            self._samples(made, (i,), step, made.pictures[i].prompt if shared else place + n, level)[0]
            for n, i in enumerate(numbers)
            for level in range(levels)
        ]
        texts = [made.conditions[made.pictures[i].prompt].text for i in numbers for _ in range(levels)]
        given = torch.tensor([made.pictures[i].advantage for i in numbers for _ in range(levels)])
        return self._forward(samples, texts, given.to(samples[0].target))

    def _forward(self, samples: list[FlowSample], texts: list[Tensor], advantage: Tensor) -> Losses:
        """SFT, NFT and AWM: losses of noised pictures."""
        recipe, noisy, others = self.recipe, interpolated(samples), {}
        for policy in self.policies.kept:
            if policy == "round" or (policy == "start" and not (isinstance(recipe, ForwardRecipe) and recipe.anchor)):
                continue
            with self.policies.use(policy):
                others[policy] = velocities(self.transformer, samples, noisy, texts)
        v = velocities(self.transformer, samples, noisy, texts)
        extra: dict[str, float] = {}
        if isinstance(recipe, NftRecipe):
            found, extra = losses.nft(v, others["old"], samples, advantage, recipe.beta)
        elif isinstance(recipe, AwmRecipe):
            power = recipe.power if recipe.error == "power" else None
            found, extra = losses.awm(v, samples, advantage, power)
            if recipe.self_anchor:
                found = found + recipe.self_anchor * losses.distance(v, others["average"])
        else:
            assert isinstance(recipe, SftRecipe)
            found = velocity_errors(v, samples)
        if isinstance(recipe, ForwardRecipe) and recipe.anchor:
            apart = losses.distance(v, others["start"])
            found, extra["from_start"] = found + recipe.anchor * apart, float(apart.detach().mean())
        return self._losses(found, samples, samples, texts, extra, 3 + len(others))

    def _grpo(self, made: Round, units: list[tuple[int, ...]]) -> Losses:
        recipe = self.recipe
        assert isinstance(recipe, GrpoRecipe)
        pictures = [made.pictures[i] for (i,) in units]
        taken = [one for picture in pictures for one in picture.taken]
        conditions = [made.conditions[picture.prompt] for picture in pictures for _ in picture.taken]
        given = torch.tensor([picture.advantage for picture in pictures for _ in picture.taken])
        states, sigmas = [one.before for one in taken], [one.step.sigma for one in taken]
        with self.policies.use("round"):
            old = velocity_of(self.transformer, conditions, states, sigmas, recipe.guidance)
        reference = old if recipe.kl and recipe.reference == "round" else None
        if recipe.kl and reference is None:
            with self.policies.use(recipe.reference):
                reference = velocity_of(self.transformer, conditions, states, sigmas, recipe.guidance)
        v = velocity_of(self.transformer, conditions, states, sigmas, recipe.guidance)
        terms = losses.GrpoTerms(recipe.clip, recipe.ratio == "guard", recipe.kl, recipe.kl_form)
        found, extra = losses.grpo(v, old, taken, given.to(states[0]), reference, terms)
        samples = [c.at(x, sigma) for c, x, sigma in zip(conditions, states, sigmas)]
        return self._losses(found, samples, samples, [c.text for c in conditions], extra, 4 + (recipe.kl > 0))

    def _taken(self, made: Round, place: int) -> list[tuple[int, ...]]:
        """The units of a micro-batch: epoch after epoch, each in an order of its own; where the pictures of a prompt
        share their noise they come together."""
        recipe, units = self.recipe, made.units
        if not units:
            return []
        together = isinstance(recipe, (ForwardRecipe, GrpoRecipe))
        groups: dict[int, list[tuple[int, ...]]] = {}
        for n, unit in enumerate(units):
            groups.setdefault(made.pictures[unit[0]].prompt if together else n, []).append(unit)
        found: list[tuple[int, ...]] = []
        epoch, skip = divmod(place, len(units))
        while len(found) < skip + recipe.batch:
            order = generator(recipe.seed, "units", step=made.step, sample=epoch).permutation(len(groups))
            found += [unit for k in order for unit in list(groups.values())[k]]
            epoch += 1
        return found[skip : skip + recipe.batch]

    def _samples(self, made: Round, unit: Sequence[int], step: int, place: int, level: int) -> list[FlowSample]:
        """Pictures with one noise at one level, a function of (seed, step, place, level)."""
        recipe, found = self.recipe, []
        first = made.pictures[unit[0]]
        condition = made.conditions[first.prompt]
        draws = generator(recipe.seed, f"level {level}", step=step, sample=place)
        sigma = noise_level(draws, recipe.sigma, len(first.x0))
        noise = normal(tuple(first.x0.shape), recipe.seed, f"noise {level}", step=step, sample=place).to(first.x0)
        for i in unit:
            references = condition.references, condition.reference_shapes
            found.append(FlowSample(made.pictures[i].x0, condition.shape, noise, sigma, *references))
        return found

    def _losses(
        self, found: Tensor, logged: Sequence[FlowSample], samples: Sequence[FlowSample], texts: Sequence[Tensor],
        extra: dict[str, float], passes: int,
    ) -> Losses:  # fmt: skip
        """passes: forward passes' worth of operations, a backward pass being two."""
        images = [len(s.target) + sum(map(len, s.references)) for s in samples]
        adapters = self.recipe.lora.rank > 0
        flops = step_flops(self.transformer.config, images, [len(t) for t in texts], adapters=adapters) * passes / 3
        return Losses(found.mean(), found, sum(images), extra, flops, [s.sigma for s in logged])
