"""The arguments that the calls of all pipelines share, and how they are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TENSOR_INPUTS = ("latents", "prompt_embeds")


@dataclass
class Request:
    """The arguments that the calls of all pipelines share; see `QwenImagePipeline.__call__`."""

    prompt: Any
    negative_prompt: Any
    true_cfg_scale: float
    num_inference_steps: int
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    num_images_per_prompt: int
    generator: Any
    latents: Any
    prompt_embeds: Any
    prompt_embeds_mask: Tensor | None
    negative_prompt_embeds: Any
    negative_prompt_embeds_mask: Tensor | None
    output_type: str
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    max_sequence_length: int
    seed: int | Sequence[int] | None
    progress: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """From a call's `locals()`."""
        return cls(**{f.name: arguments[f.name] for f in fields(cls)})


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def per_prompt(name: str, value: Any, prompts: int) -> list[Any]:
    """A list, a tuple or a batch of pictures with an entry for each prompt, or one value for all of them."""
    if getattr(value, "ndim", 0) == 4:
        value = list(value) if len(value) != 1 else value[0]
    if not isinstance(value, (list, tuple)):
        return [value] * prompts
    if len(value) != prompts:
        raise ValueError(f"{name} must be one for all or one for each prompt, {prompts}, got {len(value)}")
    return list(value)
