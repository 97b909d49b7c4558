"""Editing inside a mask: `QwenImageEditInpaintPipeline`, with the call of diffusers' pipeline of that name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.pictures import Picture
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.conditions import VAE_AREA, encode_seen, prepare_reference
from qwen_image_fast.pipelines.editing import PicturePrompts
from qwen_image_fast.pipelines.images import area_size, resize
from qwen_image_fast.pipelines.in_parts import Parts, in_parts
from qwen_image_fast.pipelines.starting import StartingPipeline


class QwenImageEditInpaintPipeline(PicturePrompts, StartingPipeline):
    """Edit pictures where a mask is white; the picture is also the reference."""

    plus = False
    condition_area = VAE_AREA

    @in_parts
    def __call__(
        self,
        image: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        masked_image_latents: Tensor | None = None,
        true_cfg_scale: float = 4.0,
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
        condition_area: int | None = None,
        grid_positions: bool = True,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Parts:
        """Edit masked pictures. Further arguments: the calls of `QwenImageInpaintPipeline` and `QwenImageEditPipeline`.

        Args:
            height, width: with `preserve_size` pixels of the result, default: those of the picture; without it they
                have no effect, as in diffusers.
            condition_area: pixels of the picture for Qwen2.5-VL; with `preserve_size` an upper bound. None: as trained.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        self._begin(call)
        pictures = [own for (own,) in self._pictures_of(image, self._count(call))]
        masks = self._masks(pictures, mask_image)
        if preserve_size:
            pixels = self._pixels(height, width, [(p.height, p.width) for p in pictures])
        else:
            pixels = [area_size(VAE_AREA, *p.size)[::-1] for p in pictures]
        area = self.condition_area if condition_area is None else condition_area
        prepared = [prepare_reference(p, preserve_size=preserve_size, condition_area=area) for p in pictures]
        seen = self._look(call, [p.condition for p in prepared])

        def encode(prompts: Sequence[str]):
            each = [[s] for s in seen]
            return encode_seen(self.text_encoder, self.tokenizer, prompts, each, self.plus, grid_positions)

        if not preserve_size:
            pictures = [resize(p, w, h) for p, (h, w) in zip(pictures, pixels)]
            masks = [resize(m, w, h) for m, (h, w) in zip(masks, pixels)]
        return (yield from self._change(
            call, pictures, pixels, strength=strength, preserve_size=preserve_size, masks=masks,
            padding_mask_crop=padding_mask_crop, encode=encode, as_reference=True,
        ))  # fmt: skip

    def _pictures_of(self, image: Any, prompts: int) -> list[list[Image.Image]]:
        return [[picture] for picture in self._pictures(image, prompts)]
