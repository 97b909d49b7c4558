"""LoRA and distilled schedules on a pipeline, with diffusers' names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_image_fast.folders import resolve_folder
from qwen_image_fast.models.lora import adapters_of
from qwen_image_fast.models.lora_files import parse_lora, read_lora
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler, named_schedule


class LoraMixin:
    """Adapters of the transformer."""

    transformer: Any
    scheduler: Any

    def load_lora_weights(
        self,
        source: str | os.PathLike | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        **hub,
    ) -> str:
        """Load an adapter and activate it beside the active ones; returns its name, by default default_0 and so on.

        Args:
            source: a safetensors file, a folder or hub repository that holds one, a file there
                ("owner/name/file.safetensors"), or the tensors themselves; keys of PEFT, diffusers, ComfyUI, kohya or
                Lightning. weight_name: the file in the folder; no other is downloaded.
            hotswap: put it in the place of the loaded adapter `adapter_name`, with its weight.
            hub: revision, cache_dir, token, local_files_only.

        Raises:
            FileNotFoundError, ValueError: no file, or one that does not fit the transformer; what is wrong is named.
        """
        adapters = adapters_of(self.transformer)
        if hotswap and adapter_name not in adapters.loaded:
            raise ValueError(f"load_lora_weights: adapter_name must be loaded to be swapped, got {adapter_name!r}")
        if adapter_name is None:
            adapter_name = next(
                n for k in range(len(adapters.loaded) + 1) if (n := f"default_{k}") not in adapters.loaded
            )
        if isinstance(source, Mapping):
            layers = parse_lora(source, self.transformer)
        else:
            path = Path(source).expanduser()
            if not path.exists():
                path, weight_name = _of_hub(os.fspath(source), weight_name, hub)
            layers = read_lora(path, self.transformer, weight_name)
        (adapters.replace if hotswap else adapters.add)(adapter_name, layers)
        return adapter_name

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make exactly these adapters active, with one weight for all (default 1) or one for each."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        adapter_weights = 1.0 if adapter_weights is None else adapter_weights
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, (int, float)) else list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights must be one for all or one for each of {len(names)}, got {len(weights)}")
        adapters_of(self.transformer).activate({n: float(w) for n, w in zip(names, weights)})

    def get_active_adapters(self) -> list[str]:
        return list(adapters_of(self.transformer).weights)

    def get_list_adapters(self) -> dict[str, list[str]]:
        return {"transformer": list(adapters_of(self.transformer).loaded)}

    def disable_lora(self) -> None:
        """No adapter is active, until `enable_lora` or `set_adapters`."""
        adapters_of(self.transformer).disable()

    def enable_lora(self) -> None:
        """Make the adapters active again that were when `disable_lora` was called."""
        adapters_of(self.transformer).enable()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters."""
        adapters_of(self.transformer).remove([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def unload_lora_weights(self) -> None:
        """Forget all adapters; what is fused stays fused."""
        adapters = adapters_of(self.transformer)
        adapters.remove(list(adapters.loaded))

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Add active adapters, or those named, to the weights, which costs nothing while sampling.

        Args:
            components, safe_fusing: for diffusers' signature; only the transformer has adapters, and files with NaN are
                refused in any case.
        """
        _check_components(components)
        adapters_of(self.transformer).fuse(lora_scale, adapter_names)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Take fused adapters out of the weights again, up to rounding; load the model again for the same bits."""
        _check_components(components)
        adapters_of(self.transformer).unfuse()

    def use_schedule(self, name: str) -> dict[str, Any]:
        """Sample as distilled weights were trained to: `pipe(prompt, **pipe.use_schedule("lightning-4"))`.

        Args:
            name: "lightning-4" or "lightning-8" (https://github.com/ModelTC/Qwen-Image-Lightning).

        Returns:
            The call's arguments that go with it: num_inference_steps and true_cfg_scale.
        """
        config, arguments = named_schedule(name)
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config, **config)
        return arguments


def _of_hub(source: str, weight_name: str | None, hub: Mapping[str, Any]) -> tuple[Path, str | None]:
    """The folder of "owner/name" or "owner/name/file.safetensors", and the file in it, if that is known."""
    owner, name, file = (*source.split("/", 2), "", "")[:3]
    if weight_name is None and file.endswith(".safetensors") and owner not in ("", ".", "..", "~"):
        source, weight_name = f"{owner}/{name}", file
    files = ["*.safetensors"] if weight_name is None else [weight_name]
    return resolve_folder(source, allow_patterns=[*files, "*adapter_config.json"], **hub), weight_name


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["transformer"]:
        raise ValueError(f"components must be ['transformer'], which alone has adapters, got {components!r}")
