"""Drawing pictures with the weights that learn: by deterministic steps, and by stochastic ones that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.pipelines.latents import decode_latents, to_output
from qwen_image_fast.sampling import noise_levels, schedule_shift
from qwen_image_fast.training.rollout.steps import Step, euler, guided
from qwen_image_fast.training.velocity import FlowSample, velocities


@dataclass
class Condition:
    """What a picture is drawn from. text, uncond: states of the condition encoder; uncond None: no guidance."""

    text: Tensor
    uncond: Tensor | None
    shape: ImageShape
    references: list[Tensor] = field(default_factory=list)
    reference_shapes: list[ImageShape] = field(default_factory=list)

    def at(self, x: Tensor, sigma: float) -> FlowSample:
        return FlowSample(x, self.shape, x, sigma, self.references, self.reference_shapes)


@dataclass
class Transition:
    """A stochastic step that was taken: the states before and after it."""

    step: Step
    before: Tensor
    after: Tensor


@dataclass
class Stochastic:
    """Which steps have noise. noise: of sample i at step k, like its latents."""

    kind: str
    amount: float
    window: range
    noise: Callable[[int, int], Tensor]


def schedules(scheduler: Any, conditions: Sequence[Condition], steps: int) -> list[list[float]]:
    """Noise levels of each sample, steps + 1, as the pipelines have them at its size."""
    tokens = [c.shape[0] * c.shape[1] * c.shape[2] for c in conditions]
    made = {n: noise_levels(scheduler, schedule_shift(scheduler, n), steps).tolist() for n in dict.fromkeys(tokens)}
    return [made[n] for n in tokens]


def velocity_of(
    transformer: Any, conditions: Sequence[Condition], x: Sequence[Tensor], sigmas: Sequence[float], guidance: float
) -> list[Tensor]:
    """v of each sample, with guidance above 1 of both branches in one packed batch."""
    samples = [c.at(state, sigma) for c, state, sigma in zip(conditions, x, sigmas)]
    if guidance <= 1:
        return velocities(transformer, samples, x, [c.text for c in conditions])
    empty = [c.uncond for c in conditions if c.uncond is not None]
    both = velocities(transformer, samples * 2, [*x, *x], [*(c.text for c in conditions), *empty])
    count = len(samples)
    return [guided(cond, uncond, guidance) for cond, uncond in zip(both[:count], both[count:])]


@torch.no_grad()
def draw(
    transformer: Any,
    scheduler: Any,
    conditions: Sequence[Condition],
    noise: Sequence[Tensor],
    *,
    steps: int,
    guidance: float = 1.0,
    stochastic: Stochastic | None = None,
) -> tuple[list[Tensor], list[list[Transition]]]:
    """Latents of each sample, float32 [tokens, channels], and its stochastic steps in order."""
    levels = schedules(scheduler, conditions, steps)
    x, taken = [n.float() for n in noise], [[] for _ in noise]  # type: list[Tensor], list[list[Transition]]
    for k in range(steps):
        v = velocity_of(transformer, conditions, x, [own[k] for own in levels], guidance)
        for i, own in enumerate(levels):
            if stochastic is None or k not in stochastic.window:
                x[i] = euler(x[i], v[i], own[k], own[k + 1])
                continue
            step = Step(own[k], own[k + 1], own[1], stochastic.kind, stochastic.amount)
            mean = step.mean(x[i], v[i])
            after = mean + step.std * stochastic.noise(i, k).to(mean)
            taken[i].append(Transition(step, x[i], after))
            x[i] = after
    return x, taken


@torch.no_grad()
def decoded(vae: Any, latents: Sequence[Tensor], shapes: Sequence[ImageShape]) -> list[np.ndarray]:
    """uint8 [H, W, 3] of packed latents."""
    found = []
    for tokens, (_, height, width) in zip(latents, shapes):
        pixels = to_output(decode_latents(vae, tokens, 2 * height, 2 * width), "np")
        found.append((pixels * 255).round().astype(np.uint8))
    return found
