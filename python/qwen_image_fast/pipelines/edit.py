"""Editing one picture: `QwenImageEditPipeline`, with the call of diffusers' pipeline of that name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.pictures import Picture, to_rgb
from qwen_image_fast.pipelines.arguments import Arguments, per_prompt
from qwen_image_fast.pipelines.conditions import VAE_AREA
from qwen_image_fast.pipelines.editing import PicturePrompts
from qwen_image_fast.pipelines.in_parts import Parts, in_parts


class QwenImageEditPipeline(PicturePrompts):
    """Edit one picture for each prompt, on packed batches that may mix sizes."""

    plus = False
    condition_area = VAE_AREA

    @in_parts
    def __call__(
        self,
        image: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | Sequence[int | None] | None = None,
        width: int | Sequence[int | None] | None = None,
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
        condition_area: int = VAE_AREA,
        grid_positions: bool = True,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Parts:
        """Edit pictures. Further arguments: `QwenImageEditPlusPipeline.__call__` and `QwenImagePipeline.__call__`.

        Args:
            image: one for all prompts, or a list with one for each prompt.
            height, width: pixels of the result; default: those of the picture.
            condition_area: pixels of the picture for Qwen2.5-VL; with `preserve_size` an upper bound.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        self._begin(call)
        images = self._pictures_of(image, self._count(call))
        edit = self._edit(call, images, height, width, preserve_size, condition_area, grid_positions)
        return (yield from edit)

    def _pictures_of(self, image: Any, prompts: int) -> list[list[Image.Image]]:
        if image is None:
            raise ValueError("image must be given, got None")
        return [[to_rgb("image", one)] for one in per_prompt("image", image, prompts)]
