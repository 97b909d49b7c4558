"""Step caches, attention processors, offloading and casting on the stand-alone transformer, under diffusers' names.

What they hang on modules is diffusers' own, imported when one of these methods is called. While it is there, every
module is called (called.py), in the place of the fused ops.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qwen_image_fast.extras import needed_for
from qwen_image_fast.models.hooks import hook_of_diffusers
from qwen_image_fast.models.peft_adapters import check_weights
from qwen_image_fast.once import warn_once

logger = logging.getLogger(__name__)

# The caches whose hooks stand on blocks and on attention. Others hook the whole model, or name other models.
CACHES = ("FirstBlockCacheConfig", "MagCacheConfig", "PyramidAttentionBroadcastConfig", "TaylorSeerCacheConfig")


@functools.cache
def _attention_of_diffusers(cls: Any) -> Any:
    """A kind of attention that diffusers' hooks know as attention."""
    from diffusers.models.attention import AttentionModuleMixin

    return type(cls.__name__, (cls, AttentionModuleMixin), {"__module__": cls.__module__})


class CacheMixin:
    """Step caches: parts of a step that is like the one before are taken from there. An approximation."""

    _cache_config: Any = None
    transformer_blocks: Any

    @property
    def is_cache_enabled(self) -> bool:
        return self._cache_config is not None

    def enable_cache(self, config: Any) -> None:
        """Cache as a configuration of diffusers says: FirstBlockCache, MagCache, PyramidAttentionBroadcast, TaylorSeer.

        A picture's branches with and without the prompt are one batch here, and one decision is taken for both.
        Pipelines forget what is cached before every call. ValueError: one is enabled already, or is of another kind.
        """
        mixin = self._caching("enable_cache")
        if type(config).__name__ not in CACHES:
            raise ValueError(
                f"enable_cache: config must be one of {', '.join(CACHES)}, got {type(config).__name__}; "
                "accelerate(pipe) keeps all of diffusers' caches"
            )
        mixin.enable_cache(self, config)

    def disable_cache(self) -> None:
        self._caching("disable_cache").disable_cache(self)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        self._caching("enable_cache")._reset_stateful_cache(self, recurse)

    def _caching(self, where: str) -> Any:
        """diffusers' class of this name, whose hooks know the blocks and the attention of this model."""
        with needed_for(where):
            from diffusers import CacheMixin as Mixin
            from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
        TransformerBlockRegistry.register(type(self.transformer_blocks[0]), TransformerBlockMetadata(1, 0))
        for block in self.transformer_blocks:
            if not hasattr(block.attn, "set_attention_backend"):
                kind: Any = type(block.attn)
                block.attn.__class__ = _attention_of_diffusers(kind)
        return Mixin

    @contextmanager
    def cache_context(self, name: str, **given: Any) -> Iterator[None]:
        """Around the calls that share what is cached; pipelines have contexts of their own."""
        if not self.is_cache_enabled:
            yield
            return
        with self._caching("cache_context").cache_context(self, name, **given):
            yield


class AttentionMixin:
    """Attention processors, as diffusers' models have them."""

    transformer_blocks: Any

    @property
    def attn_processors(self) -> dict[str, Any]:
        """What computes attention in each block, by `transformer_blocks.<i>.attn.processor`."""
        blocks = enumerate(self.transformer_blocks)
        return {f"transformer_blocks.{i}.attn.processor": block.attn.get_processor() for i, block in blocks}

    def set_attn_processor(self, processor: Any) -> None:
        """One for all blocks, or one for each, by the names of `attn_processors`. ValueError: other names."""
        names = list(self.attn_processors)
        if isinstance(processor, dict) and processor.keys() != set(names):
            given = f"{len(processor)}" if len(processor) != len(names) else ", ".join(map(str, processor))
            raise ValueError(
                f"set_attn_processor: the number of processors must be that of the attention layers, {len(names)}, "
                f"and their names those of attn_processors, got {given}"
            )
        for name, block in zip(names, self.transformer_blocks):
            block.attn.set_processor(processor[name] if isinstance(processor, dict) else processor)

    def fuse_qkv_projections(self) -> None:
        """For diffusers' scripts: projections run together where that is faster, which it does by itself."""
        warn_once(logger, self, "fuse_qkv_projections has no effect: projections run together where that is faster")

    def unfuse_qkv_projections(self) -> None:
        """Nothing was fused."""


class OffloadMixin:
    """Weights that hooks bring for the module that is called, or cast for it."""

    _skip_layerwise_casting_patterns = ("pos_embed", "norm")
    transformer_blocks: Any
    streamed: Any

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | os.PathLike | None = None,
    ) -> None:
        """diffusers' group offloading: weights are on `onload_device` while their block or layer computes.

        `from_pretrained(memory_limit=)` takes as little memory and keeps the fused ops. ValueError: weights are
        streamed or in 8 bits, or the pipeline's LoRAs are on them.
        """
        check_weights(self, "enable_group_offload")
        offload_groups(
            self, torch.device(onload_device), torch.device(offload_device), offload_type=offload_type,
            num_blocks_per_group=num_blocks_per_group, non_blocking=non_blocking, use_stream=use_stream,
            record_stream=record_stream, low_cpu_mem_usage=low_cpu_mem_usage, offload_to_disk_path=offload_to_disk_path,
        )  # fmt: skip

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type, ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Keep the weights of linear layers in `storage_dtype`, and cast each while it computes: an approximation.

        compute_dtype: by default the weights' own type. skip_modules_pattern: names of layers that are left as they
        are, by default norms and PEFT's. `precision="int8"` of `from_pretrained` is faster. ValueError: as above.
        """
        with needed_for("enable_layerwise_casting", 'from_pretrained(precision="int8")'):
            from diffusers.hooks import apply_layerwise_casting
            from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
        check_weights(self, "enable_layerwise_casting")
        model: Any = self
        skipped = skip_modules_pattern
        if skipped is None:
            skipped = (*DEFAULT_SKIP_MODULES_PATTERN, "lora_", "lokr_", "hada_")
        skipped = tuple({*skipped, *self._skip_layerwise_casting_patterns})
        compute_dtype = model.dtype if compute_dtype is None else compute_dtype
        apply_layerwise_casting(model, storage_dtype, compute_dtype, skipped, skip_modules_classes, non_blocking)


def offload_groups(
    model: Any,
    onload: torch.device,
    offload: torch.device,
    offload_to_disk_path: str | os.PathLike | None = None,
    **given: Any,
) -> None:
    """diffusers' group offloading of any model; `given`: its other arguments."""
    with needed_for("enable_group_offload", "from_pretrained(memory_limit=)"):
        import accelerate  # noqa: F401  diffusers' hooks move inputs with it
        from diffusers.hooks import apply_group_offloading
    path = None if offload_to_disk_path is None else os.fspath(offload_to_disk_path)
    apply_group_offloading(model, onload, offload, offload_to_disk_path=path, **given)


def check_layers_free(model: Any, where: str) -> None:
    """ValueError where the layers of a model, of any kind, are not the pipeline's to change."""
    if getattr(model, "has_peft_layers", False):
        raise ValueError(f"{where}: adapters of PEFT are in the place of layers; transformer.unload_lora() first")
    if any(hook_of_diffusers(model, name) is not None for name in ("group_offloading", "layerwise_casting")):
        raise ValueError(f"{where}: weights must stay where they are, and hooks move or cast them; load them before")
