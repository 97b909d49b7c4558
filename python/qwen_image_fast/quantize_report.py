"""How far a transformer in 8 bits is from the one that it was made of: its velocity, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIGMAS = (0.95, 0.7, 0.4, 0.1)


def velocity_errors(exact: Any, small: Any, clean: Tensor, embeds: Tensor, shape: tuple[int, int]) -> dict[str, float]:
    """Relative root mean square error of the velocity at one forward pass, by noise level.

    Args:
        exact, small: transformers; each computes in its own type.
        clean: [samples, tokens, channels] latents, to which one noise is added. embeds: [samples, text tokens, width].
        shape: tokens of the height and the width.
    """
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    errors = {}
    for sigma in SIGMAS:
        x = (1 - sigma) * clean.float() + sigma * noise
        wanted, got = (_velocity(model, x, embeds, sigma, shape) for model in (exact, small))
        errors[str(sigma)] = ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()
    return errors


@torch.no_grad()
def _velocity(model: Any, x: Tensor, embeds: Tensor, sigma: float, shape: tuple[int, int]) -> Tensor:
    dtype = model.proj_out.weight.dtype
    timestep = torch.full((len(x),), sigma, dtype=dtype)
    shapes = [[(1, *shape)]] * len(x)
    return model(x.to(dtype), embeds.to(dtype), None, timestep, shapes, return_dict=False)[0].double()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10(255^2 / mean squared error) of uint8 pictures, at most 99."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-9))))


def errors_by_kind(errors: Mapping[str, float]) -> dict[str, float]:
    """Largest error of the layers of each name, over all blocks."""
    found: dict[str, float] = {}
    for path, error in errors.items():
        kind = path.split(".", 2)[-1]
        found[kind] = max(error, found.get(kind, 0.0))
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def side_by_side(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Pairs of uint8 pictures, the exact one left of the one in 8 bits, in four columns of pairs."""
    pairs = [np.concatenate(pair, axis=1) for pair in rows]
    blank = np.full_like(pairs[0], 255)
    pairs += [blank] * (-len(pairs) % 4)
    return np.concatenate([np.concatenate(pairs[i : i + 4], axis=1) for i in range(0, len(pairs), 4)], axis=0)
