"""Stochastic steps of a flow: mean and standard deviation of the next state, and its log-probability.

Notation: sigma is the noise level before the step and sigma' < sigma the one after it, dt = sigma' - sigma < 0, v the
velocity, x0 = x - sigma v and x1 = x + (1 - sigma) v the picture and the noise that it points at. A step is
x' = mean + std z with z standard normal. Everything is float32; log-probabilities and distances are *means* over the
values of a sample, as in the public code of all methods: a ratio of probabilities is then the true one to the power of
1 / number of values, and clips are small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """sigma, after: noise levels before and after. first_after: the second level of the schedule. kind: of the step, as
    `GrpoRecipe.step`. noise: how much."""

    sigma: float
    after: float
    first_after: float
    kind: str
    noise: float

    @property
    def dt(self) -> float:
        return self.after - self.sigma

    @property
    def amount(self) -> float:
        """sigma_t: of the flow's equation a sqrt(sigma / (1 - sigma)), with the second level in the place of 1 in the
        denominator (Flow-GRPO, arXiv 2505.05470, equation 8); of Dance's the noise itself."""
        if self.kind == "dance":
            return self.noise
        limited = self.first_after if self.sigma >= 1 else self.sigma
        return self.noise * math.sqrt(self.sigma / (1 - limited))

    @property
    def std(self) -> float:
        """Of the next state: amount sqrt(|dt|); of CPS sigma' sin(a pi / 2)."""
        if self.kind == "cps":
            return self.after * math.sin(self.noise * math.pi / 2)
        return self.amount * math.sqrt(-self.dt)

    @property
    def by_velocity(self) -> float:
        """d mean / d v."""
        if self.kind == "cps":
            return -(1 - self.after) * self.sigma + math.sqrt(self.after**2 - self.std**2) * (1 - self.sigma)
        grow = 1 + self.amount**2 * (1 - self.sigma) / (2 * self.sigma)
        return grow * self.dt

    def mean(self, x: Tensor, v: Tensor) -> Tensor:
        """flow: x + [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dt (Flow-GRPO). dance: x + v dt - eta^2 / 2 score dt with
        score = -(x - (1 - sigma) x0) / sigma^2 (DanceGRPO, arXiv 2505.07818), which is the same with s = eta. cps:
        (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1 (Flow-CPS, arXiv 2509.05952), whose std does not vanish with dt."""
        if self.kind == "cps":
            kept = math.sqrt(self.after**2 - self.std**2)
            return (1 - self.after) * (x - self.sigma * v) + kept * (x + (1 - self.sigma) * v)
        drift = self.amount**2 / (2 * self.sigma)
        return x * (1 + drift * self.dt) + v * self.by_velocity


def log_probability(after: Tensor, mean: Tensor, step: Step) -> Tensor:
    """mean over the values of -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2; a scalar."""
    constant = math.log(step.std) + 0.5 * math.log(2 * math.pi)
    return -(after - mean).square().mean() / (2 * step.std**2) - constant


def divergence(velocity: Tensor, other: Tensor, step: Step, form: str = "exact") -> Tensor:
    """KL between the steps of two velocities, a mean over the values: (d mean / d v)^2 (v - v')^2 / (2 std^2).

    "flow_grpo" leaves |dt| out of the denominator, as that code does, so it is the exact one times |dt|.
    """
    exact = (velocity - other).square().mean() * (step.by_velocity**2 / (2 * step.std**2))
    return exact * -step.dt if form == "flow_grpo" else exact


def euler(x: Tensor, v: Tensor, sigma: float, after: float) -> Tensor:
    """x + v (sigma' - sigma)."""
    return x + v * (after - sigma)


def guided(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """uncond + g (cond - uncond), each token with the norm that cond has: the pipelines' true guidance."""
    mixed = uncond + guidance * (cond - uncond)
    return mixed * (torch.linalg.norm(cond, dim=-1, keepdim=True) / torch.linalg.norm(mixed, dim=-1, keepdim=True))


def window(seed_draw: float, number: int, size: int, within: int, move: str, every: int) -> range:
    """The stochastic steps of round `number`: `size` of the first `within`.

    "random": anywhere there, by `seed_draw` in [0, 1), one place for all pictures of the round. "progressive": one step
    further every `every` rounds, and from the last place back to the first (MixGRPO, arXiv 2507.21802).
    """
    places = within - size + 1
    start = min(int(seed_draw * places), places - 1) if move == "random" else number // every % places
    return range(start, start + size)
