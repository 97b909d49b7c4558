"""Inpainting: `QwenImageInpaintPipeline`, with the call of diffusers' pipeline of that name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.pictures import Picture
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.in_parts import Parts, in_parts
from qwen_image_fast.pipelines.starting import StartingPipeline


class QwenImageInpaintPipeline(StartingPipeline):
    """Change pictures where a mask is white, with a text-to-image model."""

    @in_parts
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        padding_mask_crop: int | None = None,
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
        """Change masked pictures. Further arguments: `QwenImageImg2ImgPipeline.__call__`.

        Args:
            mask_image: one for all pictures or one for each, of the picture's size or aspect ratio; what is at least
                half white changes, the rest keeps the picture's latents.
            padding_mask_crop: inpaint only the mask's surroundings, this many pixels wider, at the full size, and put
                them back; every pixel outside the mask is then the original one. Pictures out only.
            latents: the noise to mix the picture with.
            masked_image_latents: accepted for diffusers' signature, where it has no effect either.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        self._begin(call)
        pictures = self._pictures(image, self._count(call))
        masks = self._masks(pictures, mask_image)
        defaults = [(p.height, p.width) if preserve_size else (1024, 1024) for p in pictures]
        pixels = self._pixels(height, width, defaults)
        return (yield from self._change(
            call, pictures, pixels, strength=strength, preserve_size=preserve_size, masks=masks,
            padding_mask_crop=padding_mask_crop,
        ))  # fmt: skip
