"""The optimisers that a recipe may name, on groups of master weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.engine.rounding import StochasticAdamW
from qwen_image_fast.training.recipe.run import OptimizerRecipe

# What a library keeps of a whole group, beside what the recipe says: Prodigy's estimate of the learning rate.
_OF_A_GROUP = ("d", "d0", "d_max", "d_numerator", "k")


def make_optimizer(groups: list[dict[str, Any]], recipe: OptimizerRecipe, seed: int) -> torch.optim.Optimizer:
    """One of "adamw" (and what "muon" leaves to it), "adamw8bit", "adafactor" and "prodigy".

    Raises:
        ImportError: its package is not installed, in a sentence.
    """
    common: dict[str, Any] = {"lr": recipe.lr, "betas": tuple(recipe.betas), "eps": recipe.eps}
    if recipe.masters == "none":
        return StochasticAdamW(groups, seed, **common)
    if recipe.name == "adamw8bit":
        with needed_for("optimizer.name adamw8bit", "name adamw"):
            from bitsandbytes.optim import AdamW8bit
        return AdamW8bit(groups, **common)
    if recipe.name == "adafactor":
        from transformers.optimization import Adafactor

        # Its eps are others: a square's, and the smallest scale. The learning rate is the recipe's.
        fixed = {"scale_parameter": False, "relative_step": False}
        return Adafactor(groups, lr=recipe.lr, beta1=recipe.betas[0] or None, **fixed)
    if recipe.name == "prodigy":
        with needed_for("optimizer.name prodigy", "name adamw"):
            from prodigyopt import Prodigy
        with contextlib.redirect_stdout(io.StringIO()):  # it says that its decay is decoupled
            return Prodigy(groups, weight_decay=recipe.weight_decay, safeguard_warmup=recipe.warmup > 0, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def state_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Everything that an optimiser must remember, as tensors by "<parameter>/<state>": its numbers as float64, those of
    a group with the group's first parameter."""
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        first = names[id(group["params"][0])]
        found |= {f"{first}/group.{key}": _tensor(group[key]) for key in _OF_A_GROUP if key in group}
        for p in group["params"]:
            found |= {f"{names[id(p)]}/{key}": _tensor(value) for key, value in optimizer.state[p].items()}
    return found


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def load_state(optimizers: Sequence[torch.optim.Optimizer], p: Tensor, key: str, value: Tensor) -> None:
    """Put back one entry of `state_of`, of the parameter `p`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(own is p for own in group["params"]):
                back: Any = value.to(p.device)
                if value.dtype == torch.float64 and value.ndim == 0:
                    back = value.item()
                    back = int(back) if key in ("step", "group.k") else back
                if key.startswith("group."):
                    group[key.removeprefix("group.")] = back
                else:
                    optimizer.state[p][key] = back
                return
