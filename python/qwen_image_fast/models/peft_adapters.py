"""PEFT adapters on the stand-alone transformer, under diffusers' names: to train them, to save, load and mix them.

The layers are PEFT's own, which take the place of the linear layers that they adapt, and diffusers' code puts them
there; both packages are imported when the first of these methods is called. Adapters to make pictures with need neither
of them: `pipe.load_lora_weights` (lora.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from qwen_image_fast.checkpoint import PICKLE_SUFFIXES
from qwen_image_fast.extras import needed_for
from qwen_image_fast.keywords import check_saving
from qwen_image_fast.models.int8_linear import Int8Linear
from qwen_image_fast.models.modulation import restore_modulation_weights
from qwen_image_fast.models.stored_modulation import is_stored


def _mixin(where: str) -> Any:
    with needed_for(where, "pipe.load_lora_weights, which needs no other package"):
        import peft  # noqa: F401  diffusers asks for it later, in words of its own
        from diffusers.loaders import PeftAdapterMixin as Mixin
    return Mixin


class PeftAdapterMixin:
    """Methods of diffusers' class of this name; each has its arguments and results."""

    _hf_peft_config_loaded: bool | None = False
    _prepare_lora_hotswap_kwargs: dict[str, Any] | None = None
    peft_config: dict[str, Any]
    streamed: Any

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Put an adapter of a `peft.LoraConfig`, or another of PEFT's, on the layers that it names, to train it.

        ValueError: the name is taken, or the weights are in another place than the layers (LoRAs of the pipeline,
        streaming, 8 bits).
        """
        check_weights(self, "add_adapter")
        _mixin("add_adapter").add_adapter(self, adapter_config, adapter_name)

    def load_lora_adapter(
        self,
        source: str | os.PathLike | Mapping[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load a LoRA as an adapter of PEFT; `prefix`: of the keys to load. `options`: adapter_name, weight_name, ...

        ValueError: it does not fit, or is a pickle.
        """
        check_weights(self, "load_lora_adapter")
        names = [str(name) for name in (options.get("weight_name"), source) if isinstance(name, (str, os.PathLike))]
        if options.get("use_safetensors") is False or any(name.endswith(tuple(PICKLE_SUFFIXES)) for name in names):
            raise ValueError("load_lora_adapter: the file must be safetensors, as pickles are never read")
        options["use_safetensors"] = True
        _mixin("load_lora_adapter").load_lora_adapter(self, source, prefix=prefix, hotswap=hotswap, **options)

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write an adapter to `pytorch_lora_weights.safetensors`, with PEFT's configuration in the file."""
        check_saving(safe_serialization, where="save_lora_adapter")
        _mixin("save_lora_adapter").save_lora_adapter(
            self, save_directory, adapter_name, upcast_before_saving, True, weight_name
        )

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make exactly these adapters active, and no other one trainable."""
        _mixin("set_adapter").set_adapter(self, adapter_name)

    def set_adapters(self, adapter_names: str | list[str], weights: Any = None) -> None:
        """Make these adapters active, each with its weight; None: 1."""
        _mixin("set_adapters").set_adapters(self, adapter_names, weights)

    def active_adapters(self) -> list[str]:
        return _mixin("active_adapters").active_adapters(self)

    def disable_adapters(self) -> None:
        _mixin("disable_adapters").disable_adapters(self)

    def enable_adapters(self) -> None:
        _mixin("enable_adapters").enable_adapters(self)

    def disable_lora(self) -> None:
        _mixin("disable_lora").disable_lora(self)

    def enable_lora(self) -> None:
        _mixin("enable_lora").enable_lora(self)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        _mixin("delete_adapters").delete_adapters(self, adapter_names)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add active adapters, or those named, to the weights beside which they stand."""
        _mixin("fuse_lora").fuse_lora(self, lora_scale, safe_fusing, adapter_names)

    def _fuse_lora_apply(self, module: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
        _mixin("fuse_lora")._fuse_lora_apply(self, module, adapter_names)

    def unfuse_lora(self) -> None:
        _mixin("unfuse_lora").unfuse_lora(self)

    def _unfuse_lora_apply(self, module: nn.Module) -> None:
        _mixin("unfuse_lora")._unfuse_lora_apply(self, module)

    def unload_lora(self) -> None:
        """Put the plain layers back."""
        _mixin("unload_lora").unload_lora(self)

    def enable_lora_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """Make room for adapters of other ranks, before the first is loaded, so that `hotswap=True` can take them."""
        _mixin("enable_lora_hotswap").enable_lora_hotswap(self, target_rank, check_compiled)

    def _optionally_disable_offloading(self, pipeline: Any) -> Any:
        return _mixin("load_lora_adapter")._optionally_disable_offloading(pipeline)

    @property
    def has_peft_layers(self) -> bool:
        return bool(self._hf_peft_config_loaded)

    @contextmanager
    def peft_scaled(self, scale: float) -> Iterator[None]:
        """The active adapters of PEFT with `scale` times their weights."""
        from diffusers.utils import scale_lora_layers, unscale_lora_layers

        scale_lora_layers(self, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self, scale)


class PeftAdapters:
    """Adapters that PEFT put into a transformer, to be handled as `lora.LoraAdapters` are: by a pipeline's methods."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def loaded(self) -> dict[str, dict[str, Any]]:
        """By name; their layers are PEFT's to know."""
        return {name: {} for name in self.model.peft_config}

    @property
    def weights(self) -> list[str]:
        """Names of the active adapters."""
        names = self.model.active_adapters()
        return [names] if isinstance(names, str) else list(names)

    @property
    def fused(self) -> set[str]:
        return {name for layer in self.model.modules() for name in getattr(layer, "merged_adapters", ())}

    def activate(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active, each with its weight."""
        self._check(weights)
        self.model.set_adapters(list(weights), list(weights.values()))

    def disable(self) -> None:
        self.model.disable_lora()

    def enable(self) -> None:
        self.model.enable_lora()

    def remove(self, names: Sequence[str]) -> None:
        """Forget adapters; with the last, plain layers are put back, in whose weights what was fused stays."""
        self._check(names)
        if self.loaded.keys() <= set(names):
            self.model.unload_lora()
        else:
            self.model.delete_adapters(list(names))

    def fuse(self, scale: float = 1.0, names: Sequence[str] | None = None, rounding: str = "nearest") -> None:
        self._check(names or ())
        if rounding != "nearest":
            raise ValueError(f"fuse_lora: rounding must be nearest for adapters of PEFT, got {rounding!r}")
        self.model.fuse_lora(scale, adapter_names=None if names is None else list(names))

    def unfuse(self) -> None:
        self.model.unfuse_lora()

    def scaled(self, scale: float) -> AbstractContextManager[None]:
        """The active adapters with `scale` times their weights."""
        return self.model.peft_scaled(scale)

    def _check(self, names: Iterable[str]) -> None:
        if unknown := [name for name in names if name not in self.loaded]:
            there = ", ".join(self.loaded)
            raise ValueError(f"adapters must be of those that are there ({there}), got {', '.join(unknown)}")


def check_weights(model: Any, where: str) -> None:
    """ValueError where something else than the layers has the weights in hand: streaming, 8 bits, or the pipeline."""
    if model.streamed is not None:
        raise ValueError(f"{where}: weights must stay in memory, and are streamed; load without memory_limit")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError(f"{where}: layers must be floating point, got some in 8 bits; load without precision=")
    if is_stored(model):
        raise ValueError(f"{where}: modulation weights must be there, and were left out of this transformer's file")
    lora = model.__dict__.get("_lora")
    if lora is not None and lora.weights:
        there = ", ".join(lora.weights)
        raise ValueError(
            f"{where}: no LoRA of the pipeline may be active, got {there}; pipe.unload_lora_weights() first"
        )
    if model.modulation_tables.freed:
        restore_modulation_weights(model)  # what was made of them would hide an adapter on them
