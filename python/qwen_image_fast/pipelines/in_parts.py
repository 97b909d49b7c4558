"""A pipeline's call in two parts, around the denoising, which a server runs for the pictures of many calls together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, ParamSpec, cast

import torch
from torch import Tensor

from qwen_image_fast.models.lora import scaled_adapters
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.sampling import Sample


class Denoising(NamedTuple):
    """What a call needs between its two parts: the latents of `samples` after all steps.

    options: of `sampling.denoise`, which differ between pipelines.
    """

    call: Arguments
    samples: list[Sample]
    options: dict[str, Any]


# Checks and encodes, yields its one `Denoising`, is sent the latents of every sample, and returns what the call does.
Parts = Generator[Denoising, "list[Tensor]", Any]


P = ParamSpec("P")


def in_parts(parts: Callable[P, Parts]) -> Callable[P, Any]:
    """The call of a pipeline that is written as such a generator, which is its attribute `parts`."""

    @functools.wraps(parts)
    @torch.inference_mode()
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        run, pipe = parts(*args, **kwargs), cast(Any, args[0])
        scale = signature.bind(*args, **kwargs).arguments.get("attention_kwargs")
        with scaled_adapters(pipe.transformer, scale):
            work = next(run)
            try:
                run.send(pipe._denoise(work.call, work.samples, **work.options))
            except StopIteration as end:
                return end.value
        raise RuntimeError(f"{type(pipe).__name__} must denoise once in a call")

    signature = inspect.signature(parts)
    shown = signature.replace(return_annotation="QwenImagePipelineOutput | tuple")
    call.__signature__, call.parts = shown, parts  # type: ignore[attr-defined]
    return call
