"""LoRA (Hu et al., arXiv 2106.09685) on linear layers: y = W x + b + sum_i w_i (alpha_i / r_i) B_i (A_i x).

The model's own weights and the keys of its state dict stay as they are, until adapters are fused. `lora_files.py` reads
adapters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modulation import modulation_layers, restore_modulation_weights, table_layers


class Adapter(NamedTuple):
    """down: A, [rank, in]; up: B, [out, rank]; scale: alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float


class _Part(NamedTuple):
    """An adapter's part in a layer, with its weight."""

    path: str
    adapter: Adapter
    weight: float


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

    loaded: layers of each adapter, kept as they were read. weights: of the active ones. resting: of those that were
    active before they were disabled. fused: weights of those that are part of the model's own weights now.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.loaded: dict[str, dict[str, Adapter]] = {}
        self.weights: dict[str, float] = {}
        self.resting: dict[str, float] = {}
        self.fused: dict[str, float] = {}
        # What forgotten adapters left in modulation weights, which may be released and read again.
        self._left: list[_Part] = []

    def add(self, name: str, layers: Mapping[str, Adapter]) -> None:
        """Load an adapter and activate it beside the active ones."""
        if name in self.loaded:
            raise ValueError(
                f"load_lora_weights: adapter_name must be new, got {name!r}, which is loaded; hotswap=True replaces it"
            )
        self.loaded[name] = dict(layers)
        self.activate({**self.weights, name: 1.0})

    def replace(self, name: str, layers: Mapping[str, Adapter]) -> None:
        """Put another adapter in the place of a loaded one, with its weight."""
        self._check([name], self.loaded)
        self._check_not_fused([name])
        weights, resting = self.weights, self.resting
        self.activate({n: w for n, w in weights.items() if n != name})
        self.loaded[name] = dict(layers)
        self.activate(weights)
        self.resting = resting

    def activate(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active."""
        self._check(weights, self.loaded)
        self._check_not_fused(weights)
        if bad := {n: w for n, w in weights.items() if not math.isfinite(w)}:
            raise ValueError(f"set_adapters: adapter_weights must be finite, got {bad}")
        touched = {layer for name in (*self.weights, *weights) for layer in self.loaded[name]}
        self.weights, self.resting = dict(weights), {}
        self._need(touched)
        for path in touched:
            self._mix(path)

    def disable(self) -> None:
        """Make none active until `enable`."""
        resting = self.weights or self.resting
        self.activate({})
        self.resting = resting

    def enable(self) -> None:
        """Make those active that `disable` found active."""
        if self.resting:
            self.activate(self.resting)

    def remove(self, names: Sequence[str]) -> None:
        """Forget adapters; fused ones stay in the weights."""
        self._check(names, self.loaded)
        resting = {name: weight for name, weight in self.resting.items() if name not in names}
        self.activate({name: weight for name, weight in self.weights.items() if name not in names})
        self.resting = resting
        fused = {name: self.fused.pop(name) for name in names if name in self.fused}
        modulation = modulation_layers(self.model)
        self._left += [part for part in self._parts(fused) if part.path in modulation]
        for name in names:
            del self.loaded[name]

    def fuse(self, scale: float = 1.0, names: Sequence[str] | None = None) -> None:
        """Add active adapters, times `scale`, to the weights: in float32, with one rounding to the weights' type."""
        self._check(names or (), self.weights)
        fused = {n: w * scale for n, w in self.weights.items() if names is None or n in names}
        self.activate({n: w for n, w in self.weights.items() if n not in fused})
        self._add(self._parts(fused))
        self.fused.update(fused)

    def unfuse(self) -> None:
        """Subtract fused adapters from the weights, which rounds a second time, and make them active again."""
        self._add(self._parts({name: -weight for name, weight in self.fused.items()}))
        active, self.fused = {**self.weights, **self.fused}, {}
        self.activate(active)

    def fuse_again(self, paths: Collection[str]) -> None:
        """Bring what was fused into layers whose weights have been read from the model's files again."""
        self._add(part for part in (*self._left, *self._parts(self.fused)) if part.path in paths)

    def _parts(self, weights: Mapping[str, float]) -> list[_Part]:
        return [_Part(path, a, weight) for name, weight in weights.items() for path, a in self.loaded[name].items()]

    def _check_not_fused(self, names) -> None:
        if fused := [name for name in names if name in self.fused]:
            raise ValueError(f"adapters must not be fused, got {', '.join(fused)}; unfuse them first")

    @staticmethod
    def _check(names, known) -> None:
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(known) or "none"
            raise ValueError(f"adapters must be of those that are there ({there}), got {', '.join(unknown)}")

    @torch.no_grad()
    def _add(self, parts: Iterable[_Part]) -> None:
        by_layer: dict[str, list[_Part]] = defaultdict(list)
        for part in parts:
            by_layer[part.path].append(part)
        self._need(by_layer)
        for path, own in by_layer.items():
            target = self.model.get_submodule(path).weight
            total = target.float()
            for _, adapter, weight in own:
                up, down = adapter.up.to(total), adapter.down.to(total)
                total = torch.addmm(total, up, down, alpha=weight * adapter.scale)
            target.copy_(total)

    def _need(self, paths: Collection[str]) -> None:
        """Read released modulation weights again where an adapter changes what they make."""
        if self.model.modulation_tables.freed and not table_layers(self.model).keys().isdisjoint(paths):
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
