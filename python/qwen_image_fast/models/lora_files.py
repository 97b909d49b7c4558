"""LoRA files: those of PEFT and diffusers, ComfyUI, kohya's trainer and the Lightning distillations."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoint import read_json
from ..tensor_files import read_header
from .lora import Adapter

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_KEY = re.compile(
    r"(?P<layer>.+?)[._](?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.[\w-]+)?\.weight"
)
_OTHER_KINDS = {
    "DoRA": ("dora_scale", "magnitude_vector"), "LoHa": ("hada_",), "LoKr": ("lokr_",),
    "LoRA with biases": ("lora_B.bias",), "whole differences of weights": (".diff",),
}  # fmt: skip
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def read_lora(path: Path, model: nn.Module, weight_name: str | None = None) -> dict[str, Adapter]:
    """The adapter of a safetensors file, or of the folder that holds it, for the layers of `model`.

    Raises:
        FileNotFoundError, ValueError: no file, several, or one that does not fit the model; what is wrong is named.
    """
    file = _find(path, weight_name)
    read_header(file)  # a damaged file is named
    with safe_open(file, framework="pt") as content:
        state = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118  not a dict
        text = (content.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        metadata = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"load_lora_weights: lora_adapter_metadata of {file} must be a JSON object") from error
    config = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    if file.name == _FILES[1] and (file.parent / "adapter_config.json").is_file():
        config = read_json(file.parent / "adapter_config.json")
    return parse_lora(state, model, config)


def _find(path: Path, weight_name: str | None) -> Path:
    if path.is_file():
        return path
    if weight_name is not None:
        if not (path / weight_name).is_file():
            raise FileNotFoundError(f"load_lora_weights: {path} has no {weight_name}")
        return path / weight_name
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(files) != 1:
        there = ", ".join(f.name for f in files) or "none"
        raise FileNotFoundError(
            f"load_lora_weights: {path} must hold one safetensors file, or pass weight_name: {there}"
        )
    return files[0]


def parse_lora(state: Mapping[str, Tensor], model: nn.Module, config: Mapping[str, Any] | None = None):
    """Adapters by layer from the tensors of a file in any of the known styles.

    An alpha tensor beside a pair gives scale = alpha / rank; else `config` does (PEFT's r, lora_alpha, alpha_pattern,
    use_rslora); else the scale is 1.

    Raises:
        ValueError: keys that name nothing in `model`, pairs that are not whole, other shapes.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    flat = {name.replace(".", "_"): name for name in layers}
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        part = "alpha" if key.endswith(".alpha") else None
        if match:
            part = "down" if match["down"] else "up"
        name = _layer_name(match["layer"] if match else key.removesuffix(".alpha"), layers, flat)
        if part is None or name is None:
            unknown.append(key)
        elif part in found[name]:
            raise ValueError(f"load_lora_weights: {name} must have one adapter, got a second one with {key}")
        else:
            found[name][part] = tensor
    if unknown or not found:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        kinds = [kind for kind, marks in _OTHER_KINDS.items() if any(m in key for m in marks for key in unknown)]
        raise ValueError(
            f"load_lora_weights: keys must be LoRA pairs of layers of {type(model).__name__}, got "
            f"{shown or 'none at all'}" + (f" ({', '.join(kinds)}: not supported)" if kinds else "")
        )
    return {name: _adapter(name, parts, layers[name], config or {}) for name, parts in found.items()}


def _layer_name(key: str, layers: Mapping[str, Any], flat: Mapping[str, str]) -> str | None:
    key = key.removeprefix("lora_unet_")
    while (prefix := next((p for p in _PREFIXES if key.startswith(p)), None)) is not None:
        key = key.removeprefix(prefix)
    return key if key in layers else flat.get(key)


def _adapter(name: str, parts: Mapping[str, Tensor], layer: nn.Linear, config: Mapping[str, Any]) -> Adapter:
    if missing := {"down", "up"} - parts.keys():
        raise ValueError(f"load_lora_weights: {name} must have both matrices of its pair, got no {missing.pop()}")
    down, up = parts["down"], parts["up"]
    rank = down.shape[0] if down.dim() else 0
    if rank < 1 or down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
        raise ValueError(
            f"load_lora_weights: {name} must be [rank, {layer.in_features}] and [{layer.out_features}, rank], "
            f"got {list(down.shape)} and {list(up.shape)}: the file is for another model"
        )
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError(f"load_lora_weights: alpha of {name} must be one number, got {parts['alpha'].numel()}")
    for part, tensor in parts.items():
        if not (tensor.is_floating_point() or part == "alpha"):
            raise ValueError(f"load_lora_weights: {name} must hold floating-point numbers, got {tensor.dtype}")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"load_lora_weights: {name} must hold finite numbers, got NaN or infinity")
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith("." + pattern):
            alpha = value
    alpha = float(parts["alpha"]) if "alpha" in parts else alpha
    return Adapter(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
