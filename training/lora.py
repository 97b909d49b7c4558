"""Which layers get an adapter, of which rank and alpha; and the adapters' files, in PEFT's layout and in diffusers'."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write, atomic_write_all
from qwen_image_fast.models.lora_files import TASKS
from qwen_image_fast.training.adapters import AdapterLinear, DoraLinear, LokrLinear, LoraLinear
from qwen_image_fast.training.parallel.layout import Parallel, full
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import LoraRecipe

Value = TypeVar("Value")

BASE = ".base."  # in the names of the weights below an adapter
WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG = "pytorch_lora_weights", "adapter_model", "adapter_config.json"
LORAS = "loras"  # folder of a run with the adapters of each checkpoint
# Layers of a block by what they are; "text" has all of the text stream, the others are of the image stream.
GROUPS = {
    "attention": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    "mlp": ("img_mlp.net.0.proj", "img_mlp.net.2"),
    "modulation": ("img_mod.1",),
    "text": (
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "txt_mlp.net.0.proj",
        "txt_mlp.net.2", "txt_mod.1",
    ),
}  # fmt: skip


def is_adapter(name: str) -> bool:
    """Whether a parameter of a model, by its name, belongs to an adapter."""
    return ".lora_" in name or ".lokr_" in name


def fits(name: str, pattern: str) -> bool:
    """Whether a layer is meant by a pattern: a group, "all", the end of its name, or that with * and ?."""
    if pattern == "all":
        return name.startswith("transformer_blocks.")
    ends = GROUPS.get(pattern, (pattern,))
    return any(fnmatch.fnmatchcase(f".{name}", f"*.{end}") for end in ends)


def chosen(name: str, patterns: Mapping[str, Value], otherwise: Value) -> Value:
    """The value of the last pattern that means a layer."""
    return next((value for pattern, value in reversed(patterns.items()) if fits(name, pattern)), otherwise)


def rank_of(name: str, recipe: LoraRecipe) -> int:
    return chosen(name, recipe.ranks, recipe.rank)


def scale_of(name: str, recipe: LoraRecipe) -> float:
    """alpha / rank of a layer, or alpha / sqrt(rank) (rank-stabilised, Kalajdzievski, arXiv 2312.03732)."""
    rank = rank_of(name, recipe)
    return chosen(name, recipe.alphas, recipe.alpha) / (math.sqrt(rank) if recipe.rank_stabilised else rank)


def adapted_layers(model: nn.Module, recipe: LoraRecipe) -> dict[str, nn.Linear]:
    """The linear layers that `recipe.targets` mean.

    Raises:
        RecipeError: a pattern means no layer, or a rank is above a layer's, beyond which it would add nothing.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {n: m for n, m in linear.items() if any(fits(n, target) for target in recipe.targets)}
    asked = (("targets", recipe.targets, linear), ("ranks", recipe.ranks, found), ("alphas", recipe.alphas, found))
    for field, patterns, layers in asked:
        for pattern in patterns:
            if not any(fits(name, pattern) for name in layers):
                ends = sorted({re.sub(r"^transformer_blocks\.\d+\.(attn\.)?", "", name) for name in layers})
                raise RecipeError(
                    f"recipe: lora.{field} must be {', '.join(GROUPS)}, all, or ends of names of linear layers, with * "
                    f"for any letters, got {pattern!r}; there are {', '.join(ends)}"
                )
    for name, layer in found.items():
        rank, most = rank_of(name, recipe), min(layer.in_features, layer.out_features)
        if rank > most and recipe.kind != "lokr":
            raise RecipeError(f"recipe: lora.rank must be at most {most}, the rank of {name}, got {rank}")
    return found


def make_adapter(layer: nn.Linear, name: str, recipe: LoraRecipe) -> AdapterLinear:
    """The adapter of a layer, not yet begun.

    Raises:
        RecipeError: dropout is asked for where a LoKr has no rank of which parts could be left out.
    """
    rank, scale = rank_of(name, recipe), scale_of(name, recipe)
    if recipe.kind == "lokr":
        made = LokrLinear(layer, rank, scale, recipe.factor)
        if recipe.dropout and not made.rank:
            most = -(-max(made.lokr_w2.shape) // 2)
            raise RecipeError(f"recipe: lora.dropout needs lora.rank below {most} for the LoKr of {name}, got {rank}")
        return made
    return (DoraLinear if recipe.kind == "dora" else LoraLinear)(layer, rank, scale)


def add_lora(model: nn.Module, recipe: LoraRecipe, seed: int = 0) -> list[str]:
    """Put an adapter on each of `adapted_layers`; returns their names."""
    layers = adapted_layers(model, recipe)
    for name, layer in layers.items():
        model.set_submodule(name, make_adapter(layer, name, recipe))
    reset_lora(model, seed)
    return list(layers)


@torch.no_grad()
def reset_lora(model: nn.Module, seed: int) -> None:
    """Begin every adapter, without effect on its layer, drawn from (seed, name of the layer)."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            module.reset(seed, name)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors in PEFT's names: <layer>.lora_A.weight [rank, in], <layer>.lora_B.weight [out, rank], of DoRA
    also <layer>.lora_magnitude_vector [out]; of LoKr <layer>.lokr_w1, and lokr_w2 or lokr_w2_a and lokr_w2_b."""
    return {
        f"{name}.{part}": tensor.detach()
        for name, module in model.named_modules()
        if isinstance(module, AdapterLinear)
        for part, tensor in module.tensors().items()
    }


def save_lora(
    model: Any, folder: Path, recipe: LoraRecipe, parallel: Parallel | None = None, tasks: Iterable[str] = ()
) -> None:
    """Write the adapters twice: for diffusers and everything that reads its layout, and for PEFT.

    Of several ranks every one calls it and rank 0 writes.

    `pytorch_lora_weights.safetensors` has keys "transformer.<layer>.lora_A.weight" and B, or LoKr's W1, times its
    scale, since a file without alpha is read with scale 1; an alpha tensor would make diffusers take the file for one
    of another tool. `adapter_model.safetensors` and `adapter_config.json` are PEFT's: keys
    "base_model.model.<layer>...", ranks and alphas in the configuration.
    """
    save_lora_file(model, folder / f"{WEIGHTS}.safetensors", parallel, tasks)
    state = {n: full(t).cpu() for n, t in lora_state(model).items()}
    if parallel is not None and not parallel.main:
        return
    config = json_bytes(peft_config(model, recipe))
    content = save({f"base_model.model.{n}": t.contiguous() for n, t in state.items()}, _texts(tasks))
    atomic_write_all({
        folder / f"{PEFT_WEIGHTS}.safetensors": lambda file: file.write(content),
        folder / PEFT_CONFIG: lambda file: file.write(config),
    })  # fmt: skip


def for_diffusers(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `lora_state` as `pytorch_lora_weights.safetensors` holds them."""
    scales = {name: m.scale for name, m in model.named_modules() if isinstance(m, AdapterLinear)}

    def scaled(name: str, tensor: Tensor) -> Tensor:
        layer = re.sub(r"\.(lora_B\.weight|lokr_w1)$", "", name)
        return tensor if layer == name else tensor * scales[layer]

    return {f"transformer.{name}": scaled(name, tensor) for name, tensor in state.items()}


def for_comfyui(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `for_diffusers` by ComfyUI's names: diffusion_model.<layer>.lora_down, lora_up and alpha, which is
    the rank, so that the scale is 1; of DoRA also dora_scale [out, 1]; of LoKr lokr_w1 and so on, as they are."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, _, part = ("diffusion_model." + key.removeprefix("transformer.")).rpartition(".lora_")
        if part == "A.weight":
            out[f"{layer}.lora_down.weight"], out[f"{layer}.alpha"] = tensor, torch.tensor(float(len(tensor)))
        elif part == "B.weight":
            out[f"{layer}.lora_up.weight"] = tensor
        elif part == "magnitude_vector":
            out[f"{layer}.dora_scale"] = tensor[:, None]
        else:
            out["diffusion_model." + key.removeprefix("transformer.")] = tensor
    return out


def save_lora_file(model: Any, path: Path, parallel: Parallel | None = None, tasks: Iterable[str] = ()) -> Path:
    """Write the adapters as one file in diffusers' layout, and return its path. Of several ranks as `save_lora`.

    tasks: of `data.tasks`, what they were learned from, kept in the file's texts, as in PEFT's.
    """
    state = {n: full(t).cpu() for n, t in lora_state(model).items()}
    if parallel is None or parallel.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({n: t.contiguous() for n, t in for_diffusers(state, model).items()}, _texts(tasks))
        atomic_write(path, lambda file: file.write(content))
    return path


def _texts(tasks: Iterable[str]) -> dict[str, str]:
    """Of a file: what its adapters were learned from, in both layouts; PEFT and diffusers read neither."""
    return {"format": "pt", **({TASKS: " ".join(sorted(tasks))} if tasks else {})}


def peft_config(model: nn.Module, recipe: LoraRecipe) -> dict[str, Any]:
    """`adapter_config.json`: layers by their whole names, and what differs from the common rank and alpha by layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear)}
    ranks = {name: rank_of(name, recipe) for name in layers}
    config: dict[str, Any] = {"r": recipe.rank, "target_modules": sorted(layers)}
    config["rank_pattern"] = {name: rank for name, rank in ranks.items() if rank != recipe.rank}
    if recipe.kind == "lokr":
        # PEFT divides by the rank alone, and scales whole factors too.
        alphas = {name: module.scale * ranks[name] for name, module in layers.items()}
        pattern = {name: alpha for name, alpha in alphas.items() if alpha != recipe.alpha}
        return {"peft_type": "LOKR", "alpha": recipe.alpha, "decompose_factor": recipe.factor or -1,
                "alpha_pattern": pattern, **config}  # fmt: skip
    alphas = {name: chosen(name, recipe.alphas, recipe.alpha) for name in layers}
    pattern = {name: alpha for name, alpha in alphas.items() if alpha != recipe.alpha}
    kinds = {"use_dora": recipe.kind == "dora", "use_rslora": recipe.rank_stabilised}
    return {"peft_type": "LORA", "lora_alpha": recipe.alpha, "alpha_pattern": pattern, **kinds, **config}


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
