"""diffusers' offloading of a pipeline, under its names: what fits on the GPU stays there, and the rest is streamed.

Blocks come from memory of the host while those before them compute, with the same results; no model waits there as a
whole. From files, and under a limit of your own: `from_pretrained(memory_limit=)`. Not yet run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from qwen_image_fast.keywords import check_visible, refuse
from qwen_image_fast.models.diffusers_hooks import offload_groups
from qwen_image_fast.models.int8_linear import Int8Linear
from qwen_image_fast.models.lora import adapters_of
from qwen_image_fast.models.modulation import restore_modulation_weights
from qwen_image_fast.models.streamed_parts import CPU, is_streamed, plan_of, restore_parts, stream_parts
from qwen_image_fast.weights.memory import free_bytes

logger = logging.getLogger(__name__)

_GROUP_OPTIONS = ("non_blocking", "use_stream", "record_stream", "low_cpu_mem_usage", "offload_to_disk_path")
FREE = 0.95  # of the GPU's free memory, of which the allocator loses some


class OffloadMixin:
    """`enable_model_cpu_offload`, `enable_sequential_cpu_offload` and `enable_group_offload`."""

    transformer: Any
    vae: Any
    text_encoder: Any
    _offloaded = False
    _limit_before: Any = None  # of the VAE

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Compute on a GPU that the models need not fit on: what its free memory holds stays, the rest is streamed.

        Args:
            gpu_id, device: the GPU, by number or as "cuda:1"; default: the current one.

        Raises:
            ValueError: torch sees no such GPU, not even two blocks fit, CUDA graphs are on, or weights are streamed
                already, shared among processes or in 8 bits.
        """
        self._offload("enable_model_cpu_offload", gpu_id, device, least=False)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """As above with the least memory: nothing that can be streamed stays."""
        self._offload("enable_sequential_cpu_offload", gpu_id, device, least=True)

    def enable_group_offload(
        self,
        onload_device: str | torch.device,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        *,
        exclude_modules: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """diffusers' group offloading of the transformer and the text encoder; the other models go to `onload_device`.

        `enable_model_cpu_offload` takes as little memory and keeps the fused ops. `options`: as of the transformer's
        method. exclude_modules: models that go to `onload_device` as a whole, too.

        ValueError: weights are streamed or in 8 bits, or the pipeline's LoRAs are on them; an unknown model.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        parts = self._offloadable()
        refuse("enable_group_offload", [n for n in options if n not in _GROUP_OPTIONS], _GROUP_OPTIONS)
        if unknown := [name for name in excluded if name not in (*parts, "controlnet")]:
            raise ValueError(f"enable_group_offload: exclude_modules must be of {', '.join(parts)}, got {unknown[0]}")
        given = {"offload_type": offload_type, "num_blocks_per_group": num_blocks_per_group, **options}
        onload, offload = torch.device(onload_device), torch.device(offload_device)
        check_visible("enable_group_offload", onload)
        for name, part in parts.items():
            if name in excluded or name not in ("transformer", "text_encoder"):
                part.to(onload)
            elif name == "transformer":
                part.enable_group_offload(onload, offload, **given)
            else:
                offload_groups(part, onload, offload, **given)

    def remove_all_hooks(self) -> None:
        """Undo offloading: all weights are in the host's memory again."""
        if not self._offloaded:
            return
        self._offloaded = False
        parts = self._offloadable()
        restore_parts(parts)
        for part in parts.values():
            part.to(CPU)
        self._readapt()
        if self.vae is not None:
            self.vae.memory_limit = self._limit_before

    def maybe_free_model_hooks(self) -> None:
        """For diffusers' scripts: nothing is left to bring back, as no model waits as a whole."""

    def _offloadable(self) -> dict[str, Any]:
        pipe: Any = self  # a pipeline, which may have ControlNets besides
        named = {"transformer": self.transformer, "text_encoder": self.text_encoder, "vae": self.vae}
        known = {id(part) for part in named.values()}
        others = [part for part in pipe._modules if id(part) not in known]
        return {n: p for n, p in named.items() if p is not None} | {f"part {i}": p for i, p in enumerate(others)}

    def _offload(self, where: str, gpu_id: int | None, device: str | torch.device | None, least: bool) -> None:
        place = torch.device(device or ("cuda" if gpu_id is None else f"cuda:{gpu_id}"))
        if gpu_id is not None and place.index not in (None, gpu_id):
            raise ValueError(f"{where}: gpu_id and device must name one GPU, got {gpu_id} and {device}")
        if place.type == "cpu":
            logger.warning("%s has no effect on the CPU, where the models are", where)
            return
        check_visible(where, place)
        parts = self._offloadable()
        self._check_offload(where, parts)
        for part in parts.values():
            part.to(CPU)
        self._stream(parts, None if least else int(FREE * (free_bytes(place) or 0)), place)

    def _check_offload(self, where: str, parts: dict[str, Any]) -> None:
        if "transformer" not in parts:
            raise ValueError(f"{where}: this {type(self).__name__} was made with transformer=None; use to(device)")
        if any(map(is_streamed, parts.values())):
            raise ValueError(f"{where}: weights must be in memory, and are streamed already; remove_all_hooks() first")
        if any(isinstance(module, Int8Linear) for module in self.transformer.modules()):
            raise ValueError(
                f"{where}: layers must be floating point, got some in 8 bits; give precision= and memory_limit= to "
                "from_pretrained"
            )
        if getattr(self, "cuda_graphs", None) is not None:
            raise ValueError(f"{where}: CUDA graphs must be off, call disable_cuda_graphs() first")
        if self.transformer.ranks is not None:
            raise ValueError(f"{where}: the transformer must compute alone, call disable_parallel() first")

    def _stream(self, parts: dict[str, Any], limit: int | None, device: torch.device) -> None:
        restore_modulation_weights(self.transformer)
        plan = plan_of(parts, limit, base=0)
        stream_parts(parts, plan, device)
        self._offloaded = True
        self._readapt()
        if self.vae is not None:
            self._limit_before = self.vae.memory_limit
            self.vae.set_memory_limit(plan.working)

    def _readapt(self) -> None:
        """Bring active adapters to where the weights beside which they lie are now."""
        adapters = adapters_of(self.transformer)
        weights, resting = adapters.weights, adapters.resting
        adapters.activate({})
        adapters.activate(weights)
        adapters.resting = resting
