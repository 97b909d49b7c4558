"""diffusers' other methods of a pipeline: those that have a counterpart here, and for the rest what to do instead."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from tqdm import std
from tqdm.auto import tqdm

from qwen_image_fast.folders import resolve_folder
from qwen_image_fast.keywords import HUB, keyword_names, one_dtype, refuse
from qwen_image_fast.models.base import Config

logger = logging.getLogger(__name__)

ELSEWHERE = {
    "reset_device_map": "all parts are on pipe.device",
    "hf_device_map": "all parts are on pipe.device",
    "enable_lora_hotswap": "load_lora_weights(..., hotswap=True) needs no preparation",
    "lora_state_dict": "load_lora_weights reads LoRA files of every format; safetensors.torch.load_file reads tensors",
    "push_to_hub": "save_pretrained, then huggingface_hub.upload_folder",
    "numpy_to_pil": 'pass output_type="pil"',
    "image_processor": "the call takes pictures as they are, and output_type says how they come back",
    "register_modules": "assign the part, as in pipe.vae = vae",
    "check_inputs": "a call checks its arguments before anything is computed",
    "prepare_latents": "the call draws noise from generator= or seed=, or takes it as latents=",
    "fuse_qkv_projections": "projections run together where that is faster",
}


class Counterparts:
    """What is there under diffusers' names besides `__call__`, `from_pretrained`, `save_pretrained` and `to`."""

    parts: ClassVar[dict[str, list[str]]]
    uses_vision: ClassVar[bool]
    writes_captions: ClassVar[bool]
    free_modulation_weights: bool
    prompt_enhancer: Any
    vae: Any
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds"]
    _optional_components: ClassVar[list[str]] = []
    _source: Path | None = None
    _read: dict[str, Any]
    _interrupt = False
    _guidance_scale: float | None = None
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps = 0
    _current_timestep: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        why = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise AttributeError(f"{type(self).__name__} has no {name}{why}", name=name, obj=self)

    # ---- the last call ------------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float | None:
        """As the last call was given it; no released model uses it."""
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """As the last call was given them."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Steps that the last call takes, fewer than asked for where it starts from a picture."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """1000 sigma of the step that is taken, or behind which a callback is called; None outside of a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step, as in diffusers."""
        return self._interrupt

    # ---- the parts ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """As model_index.json has it."""
        index = {n: tuple(kind) if getattr(self, n) is not None else (None, None) for n, kind in self.parts.items()}
        return Config({"_class_name": type(self).__name__, **index})

    @property
    def name_or_path(self) -> str | None:
        """The folder that the pipeline was read from."""
        return None if self._source is None else str(self._source)

    @classmethod
    def from_pipe(cls, pipeline: Any, *, torch_dtype: Any = None, dtype: Any = None, **components):
        """Another pipeline around the parts of one, which both then share; `components` replace or complete them.

        Raises:
            TypeError: `pipeline` is not one of this package, or a keyword is unknown.
            ValueError: a part is missing, or does not do what this pipeline needs of it.
        """
        if not isinstance(pipeline, Counterparts):
            kind = f"{type(pipeline).__module__}.{type(pipeline).__name__}"
            raise TypeError(
                f"from_pipe: pipeline must be one of this package, got {kind}; accelerate(pipe) speeds up diffusers'"
            )
        refuse("from_pipe", [n for n in components if n not in cls.parts], [*cls.parts, "torch_dtype", "dtype"])
        source = type(pipeline).__name__
        if missing := [n for n in cls.parts if n not in components and n not in pipeline.parts]:
            raise ValueError(f"from_pipe: {missing[0]}= must be given, {source} has none")
        parts = {name: components[name] if name in components else getattr(pipeline, name) for name in cls.parts}
        encoder = parts["text_encoder"]
        if encoder is not None and "text_encoder" not in components:
            if cls.writes_captions and not hasattr(encoder, "lm_head"):
                raise ValueError(f"from_pipe: text_encoder= must be given with its head, which {source} does not load")
            if cls.uses_vision and getattr(encoder, "visual", encoder) is None:
                raise ValueError(
                    f"from_pipe: text_encoder= must be given with its vision tower, which {source} does not load"
                )
        make: Any = cls
        pipe = make(**parts, free_modulation_weights=pipeline.free_modulation_weights)
        pipe._source, pipe._read = pipeline._source, dict(pipeline._read)
        pipe._progress_bar_config, pipe.prompt_enhancer = pipeline._progress_bar_config, pipeline.prompt_enhancer
        cast = one_dtype(torch_dtype, dtype)
        return pipe if cast is None else pipe.to(cast)

    @classmethod
    def download(cls, name_or_path: str | os.PathLike, **hub) -> str:
        """The local folder of a hub repository; `hub` takes revision, cache_dir, token and local_files_only."""
        refuse("download", [name for name in hub if name not in HUB], HUB)
        return str(resolve_folder(name_or_path, **hub))

    # ---- the progress bar ---------------------------------------------------------------------------------------

    _progress_bar_config: ClassVar[dict[str, Any]] = {}

    def set_progress_bar_config(self, **options) -> None:
        """Options of tqdm for the bars of later calls, `disable=True` for none, as `progress=False` for one call."""
        known = keyword_names(std.tqdm.__init__)
        refuse("set_progress_bar_config", [name for name in options if name not in known], known[1:])
        vars(self)["_progress_bar_config"] = options

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """A bar with these options."""
        if (iterable is None) == (total is None):
            got = "neither" if total is None else "both"
            raise ValueError(f"progress_bar: give either iterable or total, got {got}")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    # ---- memory -------------------------------------------------------------------------------------------------

    def enable_vae_slicing(self) -> None:
        """`pipe.vae.enable_slicing()`."""
        self._vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        self._vae().disable_slicing()

    def enable_vae_tiling(self) -> None:
        """`pipe.vae.enable_tiling()`; `pipe.vae.set_memory_limit` takes little memory with the same result."""
        self._vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        self._vae().disable_tiling()

    def _vae(self) -> Any:
        if self.vae is None:
            raise ValueError(f"{type(self).__name__} was made with vae=None")
        return self.vae

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """For diffusers' scripts: no layer of this model can be sliced, there nor here."""
        logger.warning("enable_attention_slicing has no effect: no layer of this model can be sliced")

    def disable_attention_slicing(self) -> None:
        """Nothing was enabled."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """For diffusers' scripts: this package chooses its attention itself."""
        logger.warning("enable_xformers_memory_efficient_attention has no effect: attention is this package's own")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Nothing was enabled."""
