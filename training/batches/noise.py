"""Noise levels of training by name, and what a sample's loss counts at its level."""

from __future__ import annotations

import math

import numpy as np

from qwen_image_fast.schedulers import calculate_shift
from qwen_image_fast.training.recipe.flow import SigmaRecipe

# Of the released model's scheduler: mu is 0.5 for 256 tokens of the target and 0.9 for 8192.
_SHIFTS = (256, 8192, 0.5, 0.9)


def noise_level(draws: np.random.Generator, recipe: SigmaRecipe, tokens: int) -> float:
    """sigma in (0, 1) of a target of so many tokens.

    "logit-normal": sigma = sigmoid(mean + std n), n standard normal (Qwen-Image report, arXiv 2508.02324, section 4.1).
    "uniform": u in (0, 1). "shifted": s u / (1 + (s - 1) u) with `shift` s. "resolution": the same with s = e^mu, mu
    from the target's tokens as at inference, so that large pictures are seen at higher levels.
    """
    normal = float(draws.standard_normal())
    if recipe.name == "logit-normal":
        return 1.0 / (1.0 + math.exp(-(recipe.mean + recipe.std * normal)))
    # By the normal distribution too, so that all names draw the same random numbers.
    uniform = 0.5 * math.erfc(-normal / math.sqrt(2))
    if recipe.name == "uniform":
        return uniform
    shift = recipe.shift if recipe.name == "shifted" else math.exp(calculate_shift(tokens, *_SHIFTS))
    return shift * uniform / (1 + (shift - 1) * uniform)


def weight_at(sigma: float, recipe: SigmaRecipe) -> float:
    """What the loss of a sample at level sigma counts.

    "min-snr" (Hang et al., arXiv 2303.09556): the error of the picture x0, weighed by min(SNR, gamma), where SNR =
    ((1 - sigma) / sigma)^2. The velocity's error is that of x0 divided by sigma, so its weight is
    min(SNR, gamma) sigma^2 = min((1 - sigma)^2, gamma sigma^2).
    """
    return min((1 - sigma) ** 2, recipe.gamma * sigma**2) if recipe.weighting == "min-snr" else 1.0
