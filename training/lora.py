"""LoRA (Hu et al., arXiv 2106.09685) on linear layers: y = W x + b + (alpha / rank) B (A x), in PEFT's file layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen_image_fast.checkpoint import json_bytes, save_state
from qwen_image_fast.training.parallel.layout import Parallel, full, local, part_of
from qwen_image_fast.training.randomness import normal
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import LoraRecipe

ADAPTER, BASE = ".lora_", ".base."  # in the names of adapters, and of the weights below one
WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG = "pytorch_lora_weights", "adapter_model", "adapter_config.json"


class LoraLinear(nn.Module):
    """A linear layer and its adapter. `reset_lora` starts A like PEFT's (Kaiming uniform) and B at
    zero: the layer starts unchanged.

    Args:
        base: the layer, which stays frozen. rank, alpha: of the adapter. A, B: float32, as in PEFT.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)

    @property
    def weight(self) -> Tensor:
        """Of the base layer: its type and device are asked for from outside."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.weight.to(x.dtype))
        return self.base(x) + self.scale * F.linear(low, self.lora_B.weight.to(x.dtype))


def add_lora(model: nn.Module, recipe: LoraRecipe, seed: int = 0) -> list[str]:
    """Wrap the linear layers whose names end in one of `recipe.targets`; returns their names."""
    targets = recipe.targets
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == t or name.endswith("." + t) for t in targets)
    ]
    for target in targets:
        if not any(n == target or n.endswith("." + target) for n in names):
            raise RecipeError(f"recipe: lora.targets must be ends of names of linear layers, got {target!r}")
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, LoraLinear(base, recipe.rank, recipe.alpha))
    reset_lora(model, seed)
    return names


@torch.no_grad()
def reset_lora(model: nn.Module, seed: int) -> None:
    """A: uniform in +-sqrt(6 / (1 + 5) / in_features), drawn from (seed, name of the layer). B: 0."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a = module.lora_A.weight
            uniform = 2 * torch.special.ndtr(normal(tuple(a.shape), seed, f"lora {name}")) - 1
            (rows, columns), (row, column) = part_of(a)
            own = uniform[row : row + rows, column : column + columns]
            local(a).copy_(own / math.sqrt(module.base.in_features))
            local(module.lora_B.weight).zero_()


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors in PEFT's names: <layer>.lora_A.weight [rank, in], <layer>.lora_B.weight [out, rank]."""
    return {
        f"{name}.{part}.weight": getattr(module, part).weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        for part in ("lora_A", "lora_B")
    }


def save_lora(model: Any, folder: Path, recipe: LoraRecipe, parallel: Parallel | None = None) -> None:
    """Write the adapters twice: for diffusers and everything that reads its layout, and for PEFT.

    Of several ranks every one calls it and rank 0 writes.

    `pytorch_lora_weights.safetensors` has keys "transformer.<layer>.lora_A.weight" and B times alpha / rank, since a
    file without alpha is read with scale 1; an alpha tensor would make diffusers take the file for one of another tool.
    `adapter_model.safetensors` and `adapter_config.json` are PEFT's: keys "base_model.model.<layer>...", alpha in the
    configuration.
    """
    state, scale = {n: full(t).cpu() for n, t in lora_state(model).items()}, recipe.alpha / recipe.rank
    if parallel is not None and not parallel.main:
        return
    scaled = {f"transformer.{n}": t * scale if ".lora_B." in n else t for n, t in state.items()}
    save_state(scaled, folder, base_name=WEIGHTS)
    config = {"peft_type": "LORA", "r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": recipe.targets}
    named = {f"base_model.model.{n}": t for n, t in state.items()}
    save_state(named, folder, base_name=PEFT_WEIGHTS, extra_files={PEFT_CONFIG: json_bytes(config)})


def load_lora(model: nn.Module, folder: Path) -> None:
    """Copy the adapters of a folder of `save_lora`, or one by PEFT, into those of `model`."""
    own = lora_state(model)
    given = {
        n.removeprefix("base_model.model."): t for n, t in load_file(folder / f"{PEFT_WEIGHTS}.safetensors").items()
    }
    if own.keys() != given.keys():
        wrong = sorted(own.keys() ^ given.keys())
        raise ValueError(f"load_lora: {folder} must hold exactly the adapters of the model; they differ in {wrong[:3]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
