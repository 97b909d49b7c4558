"""Adapters on a model: y = (W + sum_i w_i D_i) x + b + sum_i w_i b_i in every layer that they name.

D_i is an adapter's change of the layer's weight, of LoRA (alpha / rank) B A; `lora_kinds.py` has the others and
`lora_files.py` reads them. The model's own weights and the keys of its state dict stay as they are until adapters are
fused, but for the weights of norms, to which differences are added as long as they are active.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .int8_linear import Int8Linear
from .lora_kinds import Adapter, Mix, adapted, mixed
from .modulation import restore_modulation_weights, table_layers
from .peft_adapters import PeftAdapters
from .stored_modulation import refuse_changes

logger = logging.getLogger(__name__)

ROUNDINGS = ("nearest", "stochastic")
TEXT_ENCODER = "text_encoder."  # before the names of its layers


class _Part(NamedTuple):
    """An adapter's part in a layer, with its weight; name None: of a fused adapter that was forgotten.

    factor: DoRA's, as it was when the part was fused.
    """

    name: str | None
    path: str
    adapter: Adapter
    weight: float
    factor: Tensor | None = None


class _Mixed(nn.Module):
    """A layer with active adapters."""

    mix: Mix

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.mix = tuple(None if tensor is None else fn(tensor) for tensor in self.mix)
        return self


class LoraLinear(_Mixed, nn.Linear):
    """A linear layer with active adapters."""

    def forward(self, x: Tensor) -> Tensor:
        return adapted(x, self._product, self.bias, self.mix)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


class LoraInt8Linear(_Mixed, Int8Linear):
    """A layer in 8 bits with active adapters, which are computed beside it, of the input as it came."""

    def forward(self, x: Tensor) -> Tensor:
        return adapted(x, self.product, self.bias, self.mix)


class LoraAdapters:
    """The adapters of a transformer and the text encoder beside it, or of one: which are loaded, active and fused.

    loaded: layers of each adapter, kept as they were read; those of the text encoder begin with "text_encoder.".
    weights: of the active ones. resting: of those that were active before they were disabled. fused: weights of those
    that are part of the models' own weights now.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text_encoder: Any = None
        self.loaded: dict[str, dict[str, Adapter]] = {}
        self.weights: dict[str, float] = {}
        self.resting: dict[str, float] = {}
        self.fused: dict[str, float] = {}
        # What is fused, a list for each time. Of forgotten adapters only what is in modulation weights, which may be
        # released and read again.
        self._fusions: list[list[_Part]] = []
        # Of each fused adapter that was forgotten: whether it was DoRA.
        self._forgotten: set[bool] = set()
        # Weights of norms without the differences that are active.
        self._norms: dict[str, nn.Parameter] = {}

    def add(self, name: str, layers: Mapping[str, Adapter]) -> None:
        """Load an adapter and activate it beside the active ones."""
        if name in self.loaded:
            raise ValueError(
                f"load_lora_weights: adapter_name must be new, got {name!r}, which is loaded; hotswap=True replaces it"
            )
        refuse_changes(self.model, layers.keys(), "load_lora_weights")
        self.loaded[name] = dict(layers)
        self.activate({**self.weights, name: 1.0})

    def replace(self, name: str, layers: Mapping[str, Adapter]) -> None:
        """Put another adapter in the place of a loaded one, with its weight."""
        self._check([name], self.loaded)
        self._check_not_fused([name])
        refuse_changes(self.model, layers.keys(), "load_lora_weights")
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
        for path in self._in_memory(touched):
            self._mix(path)

    def _in_memory(self, paths: Collection[str]) -> Iterator[str]:
        """The layers, those with DoRA, which looks at the weight, while it is in memory."""
        dora = {p for p in paths if any((a := own.get(p)) and a.magnitude is not None for own in self.loaded.values())}
        yield from set(paths) - dora
        for model, prefix in ((self.text_encoder, TEXT_ENCODER), (self.model, "")):
            own = {path.removeprefix(prefix) for path in dora if path.startswith(TEXT_ENCODER) == bool(prefix)}
            streamed = getattr(model, "streamed", None)
            for group in [list(own)] if streamed is None else streamed.in_units(own):
                yield from (prefix + path for path in group)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """The active adapters with `scale` times their weights."""
        weights, resting = self.weights, self.resting
        if not weights:
            logger.warning("attention_kwargs: scale has no effect, as no LoRA is active beside the weights")
        self.activate({name: weight * scale for name, weight in weights.items()})
        try:
            yield
        finally:
            self.activate(weights)
            self.resting = resting

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
        if fused := {name for name in names if self.fused.pop(name, None) is not None}:
            modulation = table_layers(self.model)
            self._forgotten |= {self._has_dora(name) for name in fused}
            for group in self._fusions:
                group[:] = [
                    part._replace(name=None) if part.name in fused else part
                    for part in group
                    if part.name not in fused or part.path in modulation
                ]
        for name in names:
            del self.loaded[name]

    def fuse(self, scale: float = 1.0, names: Sequence[str] | None = None, rounding: str = "nearest") -> None:
        """Add active adapters, times `scale`, to the weights: in float32, with one rounding to the weights' type.

        rounding: "stochastic" for layers in 8 bits (`Int8Linear.replace`), drawn by the layer's name.
        """
        self._check(names or (), self.weights)
        if rounding not in ROUNDINGS:
            raise ValueError(f"fuse_lora: rounding must be {' or '.join(ROUNDINGS)}, got {rounding!r}")
        if any(getattr(model, "streamed", None) is not None for model in (self.model, self.text_encoder)):
            raise ValueError(
                "fuse_lora: weights that are streamed are not changed; leave the adapters beside them, or load the "
                "model without memory_limit"
            )
        fused = {n: w * scale for n, w in self.weights.items() if names is None or n in names}
        for path in {path for name in fused for path in self.loaded[name]}:
            layer = self._layer(path)
            if isinstance(layer, Int8Linear) and (rounding == "nearest" or layer.int8.four or layer.float8):
                bits = 4 if layer.int8.four else 8
                ways = "leave it beside the weights, or quantise the model with it (`qwen-image-fast quantize --lora`)"
                ways = f'rounding="stochastic" keeps it in the mean; or {ways}' if bits == 8 else ways
                raise ValueError(
                    f"fuse_lora: {path} is in {bits} bits, in which an adapter would be rounded away: {ways}"
                )
        rest = {n: w for n, w in self.weights.items() if n not in fused}
        self.activate({})  # what stays active may depend on the weights
        parts = [_Part(name, path, a, w) for name, w in fused.items() for path, a in self.loaded[name].items()]
        self._fusions.append(self._add(parts))
        self.fused.update(fused)
        self.activate(rest)

    def unfuse(self) -> None:
        """Subtract fused adapters from the weights, which rounds a second time, and make them active again."""
        if any(isinstance(self._layer(part.path), Int8Linear) for group in self._fusions for part in group):
            raise ValueError("unfuse_lora: what was fused into 8 bits is rounded there; load the model again")
        if True in self._forgotten or (self._forgotten and any(map(self._has_dora, self.fused))):
            raise ValueError(
                "unfuse_lora: a DoRA adapter that was fused beside another can only be taken out with it, and one of "
                "them was forgotten; load the model again"
            )
        active = {**self.weights, **self.fused}
        self.activate({})
        for group in reversed(self._fusions):
            self._subtract([part for part in group if part.name is not None])
        self._fusions = [left for group in self._fusions if (left := [p for p in group if p.name is None])]
        self.fused = {}
        self.activate(active)

    def fuse_again(self, paths: Collection[str]) -> None:
        """Bring what was fused into layers whose weights have been read from the model's files again."""
        for group in self._fusions:
            self._add([part for part in group if part.path in paths])

    def _has_dora(self, name: str) -> bool:
        return any(adapter.magnitude is not None for adapter in self.loaded[name].values())

    def _check_not_fused(self, names) -> None:
        if fused := [name for name in names if name in self.fused]:
            raise ValueError(f"adapters must not be fused, got {', '.join(fused)}; unfuse them first")

    @staticmethod
    def _check(names, known) -> None:
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(known) or "none"
            raise ValueError(f"adapters must be of those that are there ({there}), got {', '.join(unknown)}")

    @torch.no_grad()
    def _add(self, parts: Iterable[_Part]) -> list[_Part]:
        """Add parts to the weights; returns them with DoRA's factors."""
        added = []
        for path, own in self._by_layer(parts).items():
            layer = self._layer(path)
            in_8_bits = isinstance(layer, Int8Linear)
            before = layer.dequantised() if in_8_bits else layer.weight.float()
            total, bias = before, torch.zeros(())
            for part in own:
                adapter, factor = part.adapter, part.adapter.rescaling(before)
                if adapter.change is not None:
                    total = torch.add(total, adapter.delta(before, factor), alpha=part.weight)
                if adapter.bias is not None:
                    bias = bias.to(before) + adapter.bias.to(before) * part.weight
                added.append(part._replace(factor=factor))
            if in_8_bits:
                layer.replace(total, torch.Generator("cpu").manual_seed(zlib.crc32(path.encode())))
            else:
                layer.weight.copy_(total)
            if bias.dim():
                layer.bias.copy_(layer.bias.float() + bias)
        return added

    @torch.no_grad()
    def _subtract(self, parts: Iterable[_Part]) -> None:
        """Take parts that were added together out again: W from (1 + sum_i w_i (f_i - 1)) W + sum_i w_i f_i D_i."""
        for path, own in self._by_layer(parts).items():
            layer = self._layer(path)
            total, share = layer.weight.float(), torch.ones((), device=layer.weight.device)
            zero = torch.zeros_like(share)
            for _, _, adapter, weight, factor in own:
                if adapter.change is not None:
                    total = torch.sub(total, adapter.delta(zero, factor), alpha=weight)
                if factor is not None:
                    share = share + weight * (factor - 1)
                if adapter.bias is not None:
                    layer.bias.copy_(layer.bias.float() - adapter.bias.to(total) * weight)
            layer.weight.copy_(total / share if share.dim() else total)

    def _by_layer(self, parts: Iterable[_Part]) -> dict[str, list[_Part]]:
        by_layer: dict[str, list[_Part]] = defaultdict(list)
        for part in parts:
            by_layer[part.path].append(part)
        self._need(by_layer)
        return by_layer

    def _layer(self, path: str) -> Any:
        """A layer of either model."""
        if path.startswith(TEXT_ENCODER):
            return self.text_encoder.get_submodule(path.removeprefix(TEXT_ENCODER))
        return self.model.get_submodule(path)

    def _need(self, paths: Collection[str]) -> None:
        """Read released modulation weights again where an adapter changes what they make."""
        tables = getattr(self.model, "modulation_tables", None)  # a text encoder has none
        if tables is not None and tables.freed and not table_layers(self.model).keys().isdisjoint(paths):
            restore_modulation_weights(self.model)

    @torch.no_grad()
    def _mix(self, path: str) -> None:
        """Give a layer its active adapters, or make it a plain one."""
        layer = self._layer(path)
        active = [(self.loaded[n][path], w) for n, w in self.weights.items() if path in self.loaded[n]]
        linear = isinstance(layer, nn.Linear)
        if not linear:
            self._shift(layer, path, active)
        elif active:
            layer.mix = mixed(active, _weight_of(layer, active, self.model.proj_out.weight.device))
            layer.__class__ = LoraInt8Linear if isinstance(layer, Int8Linear) else LoraLinear
        else:
            layer.__dict__.pop("mix", None)
            layer.__class__ = Int8Linear if isinstance(layer, Int8Linear) else nn.Linear

    def _shift(self, norm: Any, path: str, active: Sequence[tuple[Adapter, float]]) -> None:
        """Put a norm's own weight back, and then, where differences are active, another in its place."""
        own = self._norms.pop(path, None)
        if own is not None:
            own.data = own.data.to(norm.weight)  # the model may have been moved or cast
            norm.weight = own
        if active:
            total = norm.weight.float() + sum(a.delta(norm.weight) * w for a, w in active)
            self._norms[path] = norm.weight
            norm.weight = nn.Parameter(total.to(norm.weight.dtype), requires_grad=norm.weight.requires_grad)


def _weight_of(layer: Any, active: Sequence[tuple[Adapter, float]], device: torch.device) -> Tensor:
    """The weight that adapters change; of a layer in 8 bits, or one that is streamed to `device`, its dtype alone where
    they do not read it."""
    if not isinstance(layer, Int8Linear):
        return layer.weight.new_empty(0, device=device) if layer.weight.is_meta else layer.weight
    dtype = layer.bias.dtype
    read = any(adapter.magnitude is not None for adapter, _ in active)
    return layer.dequantised().to(dtype) if read else torch.empty(0, dtype=dtype)


def lora_scale(attention_kwargs: Mapping[str, Any] | None) -> float:
    """The weight of all LoRAs during a call, as diffusers' calls take it: 1 without `scale`.

    ValueError: not finite, or another name, which no layer of this model has a use for.
    """
    given = dict(attention_kwargs or {})
    scale = given.pop("scale", 1.0)
    if given:
        raise ValueError(
            f"attention_kwargs must hold nothing but scale, the weight of the LoRAs, got {', '.join(given)}"
        )
    if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"attention_kwargs: scale must be a finite number, got {scale!r}")
    return float(scale)


def scaled_adapters(model: Any, attention_kwargs: Mapping[str, Any] | None) -> AbstractContextManager:
    """Around a call of a model or of its pipeline."""
    scale = lora_scale(attention_kwargs) if attention_kwargs else 1.0
    return nullcontext() if scale == 1.0 or model is None else adapters_on(model).scaled(scale)


def adapters_on(model: Any) -> LoraAdapters | PeftAdapters:
    """The adapters that a transformer computes with: those of PEFT, where it has put some on it."""
    return PeftAdapters(model) if getattr(model, "has_peft_layers", False) else adapters_of(model)


def adapters_of(model: Any) -> LoraAdapters:
    """The adapters of a model, none at first."""
    if "_lora" not in model.__dict__:
        model.__dict__["_lora"] = LoraAdapters(model)
    return model.__dict__["_lora"]
