"""Image to image: `QwenImageImg2ImgPipeline`, with the call of diffusers' pipeline of that name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.pictures import Picture
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.in_parts import Parts, in_parts
from qwen_image_fast.pipelines.starting import StartingPipeline


class QwenImageImg2ImgPipeline(StartingPipeline):
    """Change pictures with a text-to-image model, from a noised copy of them on."""

    @in_parts
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        image: Picture | Sequence[Picture] | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        preserve_size: bool = True,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Parts:
        """Change pictures. Further arguments: `QwenImagePipeline.__call__`.

        Args:
            image: one for all prompts, or a list with one for each prompt.
            strength: share of the steps that are taken, in [0, 1]; at 1 nothing of the picture is left.
            latents: start from these packed latents; the picture is then not used.
            height, width: pixels of the result, to which the picture is resized; default: its own.
            preserve_size: the result has exactly that size: pictures are padded to multiples of 16 on the right and at
                the bottom, and the result is cut. False: diffusers' sizes, 1024 by default, rounded down to 16.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        self._begin(call)
        pictures = self._pictures(image, self._count(call))
        defaults = [(p.height, p.width) if preserve_size else (1024, 1024) for p in pictures]
        pixels = self._pixels(height, width, defaults)
        return (yield from self._change(call, pictures, pixels, strength=strength, preserve_size=preserve_size))
