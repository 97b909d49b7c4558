"""LoRA and distilled schedules on a pipeline, with diffusers' names."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qwen_image_fast.folders import nearest
from qwen_image_fast.keywords import check_saving
from qwen_image_fast.models.diffusers_hooks import check_layers_free
from qwen_image_fast.models.lora import TEXT_ENCODER, adapters_of, adapters_on
from qwen_image_fast.models.lora_files import locate_lora, parse_components, read_lora, write_lora
from qwen_image_fast.models.lora_keys import component_config, shown
from qwen_image_fast.models.lora_kinds import Adapter
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler, named_schedule

logger = logging.getLogger(__name__)


class LoraMixin:
    """Adapters of the transformer and of the text encoder; or, where there are any, those that PEFT put there."""

    transformer: Any
    text_encoder: Any
    scheduler: Any

    def load_lora_weights(
        self,
        source: str | os.PathLike | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        prefix: str | None = None,
        low_cpu_mem_usage: bool = True,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | None = None,
        local_files_only: bool | None = None,
        strict: bool = True,
        **unknown,
    ) -> str:
        """Load an adapter and activate it beside the active ones; returns its name, by default default_0 and so on.

        LoRA, DoRA, LoHa, LoKr and whole differences (`models/lora_kinds.py`), for the transformer, the text encoder or
        both.

        Args:
            source: a safetensors file, a folder or hub repository that holds one, a file there
                ("owner/name/file.safetensors"), or the tensors themselves; keys of PEFT, diffusers, ComfyUI, kohya,
                OneTrainer, LyCORIS, DiffSynth or Lightning.
            weight_name, subfolder: the file in the folder; no other is downloaded.
            hotswap: put it in the place of the loaded adapter `adapter_name`, with its weight.
            prefix: load only the keys that begin with it and a dot, without it.
            low_cpu_mem_usage: for diffusers' signature; tensors are read once in any case.
            use_safetensors: may be True or None, as pickles are never read.
            revision, cache_dir, token, local_files_only: of the hub.
            strict: False leaves out the keys that name no layer of the models, and warns which they are.

        Raises:
            FileNotFoundError, ValueError: no file, or one that does not fit the models; what is wrong is named.
            TypeError: an argument that is not one of these.
        """
        if unknown:
            raise TypeError(_unknown(next(iter(unknown))))
        if use_safetensors is False:
            raise ValueError("load_lora_weights: use_safetensors must be True or None, as pickles are never read")
        check_layers_free(self.transformer, "load_lora_weights")
        config: dict[str, Any] = {}
        if isinstance(source, Mapping):
            if weight_name is not None or subfolder is not None:
                raise ValueError("load_lora_weights: weight_name and subfolder must not be given with tensors")
            state = dict(source)
        else:
            hub = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
            path, weight_name = locate_lora(source, subfolder, weight_name, {"revision": revision, **hub})
            state, config = read_lora(path, weight_name)
        if prefix is not None:
            state = {k.removeprefix(f"{prefix}."): t for k, t in state.items() if k.startswith(f"{prefix}.")}
            config = component_config(config, prefix)
        layers = self._parse_adapters(state, config, strict)
        adapters = adapters_of(self.transformer)
        if hotswap and adapter_name not in adapters.loaded:
            raise ValueError(f"load_lora_weights: adapter_name must be loaded to be swapped, got {adapter_name!r}")
        if adapter_name is None:
            names = map("default_{}".format, range(len(adapters.loaded) + 1))
            adapter_name = next(name for name in names if name not in adapters.loaded)
        (adapters.replace if hotswap else adapters.add)(adapter_name, layers)
        return adapter_name

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the tensors of an adapter, as PEFT names them, to a file that diffusers and this package read.

        Args:
            transformer_lora_layers: `get_peft_model_state_dict(transformer)`, or a module whose state it is.
            weight_name: of the file, by default pytorch_lora_weights.safetensors.
            save_function: is called with the tensors and the path, instead of writing them here.
            transformer_lora_adapter_metadata: PEFT's configuration, kept in the file.

        Raises:
            ValueError: no layers, or `safe_serialization=False`, which would be a pickle.
        """
        check_saving(safe_serialization, where="save_lora_weights")
        if not transformer_lora_layers:
            raise ValueError("save_lora_weights: transformer_lora_layers must be given, got none")
        if not is_main_process:
            return
        write_lora(
            save_directory, weight_name, transformer_lora_layers, transformer_lora_adapter_metadata, save_function
        )

    def _parse_adapters(self, state: Mapping, config: Mapping[str, Any], strict: bool) -> dict[str, Adapter]:
        """The layers of both models."""
        unknown: list[str] | None = None if strict else []
        layers, text, left = parse_components(state, config, self.transformer, self.text_encoder, unknown)
        if unknown:
            logger.warning("load_lora_weights: left out, as they name no layer of the models: %s", shown(unknown))
        if left:
            what = "the text encoder" if self.text_encoder is None else "parts of the text encoder"
            logger.warning(
                "load_lora_weights: %d tensors for %s are left out, as this pipeline runs without", left, what
            )
        if text:
            adapters = adapters_of(self.transformer)
            if adapters.text_encoder not in (None, self.text_encoder):
                raise ValueError(
                    "load_lora_weights: the transformer has adapters together with another text encoder; unload them "
                    "there"
                )
            layers |= {TEXT_ENCODER + name: adapter for name, adapter in text.items()}
            adapters.text_encoder = self.text_encoder
        return layers

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make exactly these adapters active, with one weight for all (default 1) or one for each."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        adapter_weights = 1.0 if adapter_weights is None else adapter_weights
        weights = [adapter_weights] * len(names) if isinstance(adapter_weights, (int, float)) else list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights must be one for all or one for each of {len(names)}, got {len(weights)}")
        adapters_on(self.transformer).activate({n: float(w) for n, w in zip(names, weights)})

    def get_active_adapters(self) -> list[str]:
        return list(adapters_on(self.transformer).weights)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The loaded adapters of each model that has any, and of the transformer."""
        loaded = adapters_on(self.transformer).loaded
        text = [name for name, layers in loaded.items() if any(path.startswith(TEXT_ENCODER) for path in layers)]
        return {"transformer": list(loaded), **({"text_encoder": text} if text else {})}

    def disable_lora(self) -> None:
        """No adapter is active, until `enable_lora` or `set_adapters`."""
        adapters_on(self.transformer).disable()

    def enable_lora(self) -> None:
        """Make the adapters active again that were when `disable_lora` was called."""
        adapters_on(self.transformer).enable()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters."""
        adapters_on(self.transformer).remove([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def unload_lora_weights(self) -> None:
        """Forget all adapters; what is fused stays fused."""
        adapters = adapters_on(self.transformer)
        adapters.remove(list(adapters.loaded))

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        rounding: str = "nearest",
    ) -> None:
        """Add active adapters, or those named, to the weights, which costs nothing while sampling.

        Args:
            components: for diffusers' signature; an adapter is fused into both models that it changes.
            safe_fusing: also for that; files with NaN are refused in any case.
            rounding: "stochastic" fuses into layers in 8 bits too: each number becomes one of its two neighbours, by
                chance, so that a change smaller than a step stays in the mean; such layers are not unfused.
        """
        _check_components(components)
        adapters_on(self.transformer).fuse(lora_scale, adapter_names, rounding)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Take fused adapters out of the weights again, up to rounding; load the model again for the same bits."""
        _check_components(components)
        adapters_on(self.transformer).unfuse()

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that `fuse_lora` put into the weights."""
        return set(adapters_on(self.transformer).fused)

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

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


def _unknown(name: str) -> str:
    """A sentence on an argument that `load_lora_weights` does not have."""
    known = [p for p in inspect.signature(LoraMixin.load_lora_weights).parameters if p not in ("self", "unknown")]
    return f"load_lora_weights: there is no argument {name!r}" + (
        nearest(name, known) or f"; there are {', '.join(known)}"
    )


def _check_components(components: Sequence[str]) -> None:
    if "transformer" not in components or not set(components) <= {"transformer", "text_encoder"}:
        raise ValueError(
            "components must be ['transformer'], with 'text_encoder' or without, as an adapter is fused into all that "
            f"it changes, got {components!r}"
        )
