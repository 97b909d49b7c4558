"""The arguments that the calls of all pipelines share, and how they are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
WHOLE = ("num_inference_steps", "num_images_per_prompt", "max_sequence_length", "seed")
TENSOR_INPUTS = ("latents", "prompt_embeds")


@dataclass
class Arguments:
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
    def of(cls, arguments: Mapping[str, Any]) -> Arguments:
        """From a call's `locals()`."""
        return cls(**{f.name: arguments[f.name] for f in fields(cls)} | {n: whole(arguments[n]) for n in WHOLE})


def whole(value: Any) -> Any:
    """An integer, or a sequence of them, as users have it -> Python's: of numpy and torch too, and 512.0.

    What is none stays as it is, for the checks to name.
    """
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1:
        return [whole(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def per_prompt(name: str, value: Any, prompts: int) -> list[Any]:
    """A list, a tuple, an array of numbers or a batch of pictures with an entry for each prompt, or one for all."""
    if getattr(value, "ndim", 0) == 1:
        value = list(value)
    if getattr(value, "ndim", 0) == 4:
        value = list(value) if len(value) != 1 else value[0]
    if not isinstance(value, (list, tuple)):
        return [value] * prompts
    if len(value) != prompts:
        raise ValueError(f"{name} must be one for all or one for each prompt, {prompts}, got {len(value)}")
    return list(value)
