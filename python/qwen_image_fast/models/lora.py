"""LoRA (Hu et al., arXiv 2106.09685) on linear layers: y = W x + b + sum_i w_i (alpha_i / r_i) B_i (A_i x).

Adapters are read from the files of PEFT and diffusers, ComfyUI, kohya's trainer and the Lightning distillations. The
model's own weights and the keys of its state dict stay as they are, until adapters are fused.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoint import read_json
from ..tensor_files import read_header
from .modulation import modulation_layers, restore_modulation_weights

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_KEY = re.compile(
    r"(?P<layer>.+?)[._](?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.[\w-]+)?\.weight"
)
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


class Adapter(NamedTuple):
    """down: A, [rank, in]; up: B, [out, rank]; scale: alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float


class LoraLinear(nn.Linear):
    """A linear layer with active adapters: `mix` is their A side by side, and their B with all factors."""

    mix: tuple[Tensor, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.mix
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, down), up)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.mix = (fn(self.mix[0]), fn(self.mix[1]))
        return self


class LoraAdapters:
    """The adapters of one model: which are loaded, active and fused.

    loaded: layers of each adapter, kept as they were read. weights: of the active ones. fused: weights of those
    that are part of the model's own weights now.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.loaded: dict[str, dict[str, Adapter]] = {}
        self.weights: dict[str, float] = {}
        self.fused: dict[str, float] = {}

    def add(self, name: str, layers: Mapping[str, Adapter]) -> None:
        """Load an adapter and activate it beside the active ones."""
        if name in self.loaded:
            raise ValueError(f"load_lora_weights: adapter_name must be new, got {name!r}, which is loaded")
        self.loaded[name] = dict(layers)
        self.activate({**self.weights, name: 1.0})

    def activate(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active."""
        self._check(weights, self.loaded)
        if fused := [name for name in weights if name in self.fused]:
            raise ValueError(f"set_adapters: adapters must not be fused, got {', '.join(fused)}; unfuse them first")
        touched = {layer for name in (*self.weights, *weights) for layer in self.loaded[name]}
        self.weights = dict(weights)
        self._need(touched)
        for path in touched:
            self._mix(path)

    def remove(self, names: Sequence[str]) -> None:
        """Forget adapters; fused ones stay in the weights."""
        self._check(names, self.loaded)
        self.activate({name: weight for name, weight in self.weights.items() if name not in names})
        for name in names:
            del self.loaded[name]
            self.fused.pop(name, None)

    def fuse(self, scale: float = 1.0, names: Sequence[str] | None = None) -> None:
        """Add active adapters, times `scale`, to the weights: in float32, with one rounding to the weights' type."""
        self._check(names or (), self.weights)
        fused = {n: w * scale for n, w in self.weights.items() if names is None or n in names}
        self.activate({n: w for n, w in self.weights.items() if n not in fused})
        self._add(fused)
        self.fused.update(fused)

    def unfuse(self) -> None:
        """Subtract fused adapters from the weights, which rounds a second time, and make them active again."""
        self._add({name: -weight for name, weight in self.fused.items()})
        active, self.fused = {**self.weights, **self.fused}, {}
        self.activate(active)

    @staticmethod
    def _check(names, known) -> None:
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(known) or "none"
            raise ValueError(f"adapters must be of those that are there ({there}), got {', '.join(unknown)}")

    @torch.no_grad()
    def _add(self, weights: Mapping[str, float]) -> None:
        by_layer: dict[str, list[tuple[Adapter, float]]] = defaultdict(list)
        for name, weight in weights.items():
            for path, adapter in self.loaded[name].items():
                by_layer[path].append((adapter, weight))
        self._need(by_layer)
        for path, parts in by_layer.items():
            target = self.model.get_submodule(path).weight
            total = target.float()
            for adapter, weight in parts:
                up, down = adapter.up.to(total), adapter.down.to(total)
                total = torch.addmm(total, up, down, alpha=weight * adapter.scale)
            target.copy_(total)

    def _need(self, paths: Collection[str]) -> None:
        """Read released modulation weights again where an adapter changes them."""
        if self.model.modulation_tables.freed and not modulation_layers(self.model).keys().isdisjoint(paths):
            restore_modulation_weights(self.model)

    def _mix(self, path: str) -> None:
        """Give a layer its active adapters, or make it a plain one."""
        layer = self.model.get_submodule(path)
        active = [(self.loaded[n][path], w) for n, w in self.weights.items() if path in self.loaded[n]]
        if not active:
            layer.__dict__.pop("mix", None)
            layer.__class__ = nn.Linear
            return
        layer.mix = (
            torch.cat([a.down.to(layer.weight) for a, _ in active]),
            torch.cat([a.up.to(layer.weight) * (a.scale * w) for a, w in active], dim=1),
        )
        layer.__class__ = LoraLinear


def adapters_of(model: Any) -> LoraAdapters:
    """The adapters of a model, none at first."""
    if "_lora" not in model.__dict__:
        model.__dict__["_lora"] = LoraAdapters(model)
    return model.__dict__["_lora"]


def read_lora(path: Path, model: nn.Module, weight_name: str | None = None) -> dict[str, Adapter]:
    """The adapter of a safetensors file, or of the folder that holds it, for the layers of `model`.

    Raises:
        FileNotFoundError, ValueError: no file, several, or one that does not fit the model; what is wrong is named.
    """
    file = _find(path, weight_name)
    read_header(file)  # a damaged file is named
    with safe_open(file, framework="pt") as content:
        state = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118  not a dict
        metadata = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
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
        else:
            found[name][part] = tensor
    if unknown or not found:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(
            f"load_lora_weights: keys must be LoRA pairs of layers of {type(model).__name__}, got "
            f"{shown or 'none at all'}"
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
    rank = down.shape[0]
    if down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
        raise ValueError(
            f"load_lora_weights: {name} must be [rank, {layer.in_features}] and [{layer.out_features}, rank], "
            f"got {list(down.shape)} and {list(up.shape)}: the file is for another model"
        )
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith("." + pattern):
            alpha = value
    alpha = float(parts["alpha"]) if "alpha" in parts else alpha
    return Adapter(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
