"""Editing with any number of reference pictures: `QwenImageEditPlusPipeline` (Edit-2509, Edit-2511)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.pictures import Picture, to_rgb
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.conditions import CONDITION_AREA
from qwen_image_fast.pipelines.editing import PicturePrompts
from qwen_image_fast.pipelines.in_parts import Parts, in_parts


class QwenImageEditPlusPipeline(PicturePrompts):
    """Edit with 0..N references for each prompt, on packed batches that may mix all of that."""

    plus = True
    condition_area = CONDITION_AREA

    @in_parts
    def __call__(
        self,
        image: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
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
        condition_area: int = CONDITION_AREA,
        grid_positions: bool = True,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Parts:
        """Make images from references and an instruction. Further arguments: `QwenImagePipeline.__call__`.

        Args:
            image: the references: a picture, or a list of them, for every prompt; or a list with one list for each
                prompt. None or an empty list: no reference. What a picture may be: `pictures.to_rgb`.
            height, width: pixels of the result; default: those of the last reference (1024 without one).
            max_sequence_length: checked, but prompts are not cut, as in diffusers.
            preserve_size: every pixel keeps its place and scale, and the result has exactly the asked size: pictures
                are padded to multiples of 16 pixels on the right and at the bottom, and the result is cut. False:
                diffusers' sizes, about one megapixel in multiples of 32, and given sizes rounded down to 16.
            condition_area: pixels of the references for Qwen2.5-VL; with `preserve_size` an upper bound.
            grid_positions: positions of their tokens as the model was trained; False: consecutive ones, which diffusers
                gives them with transformers 5.

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
            image = []
        if getattr(image, "ndim", 0) == 4:
            image = list(image)
        if not isinstance(image, (list, tuple)):
            image = [image]
        if any(isinstance(own, (list, tuple)) for own in image):
            if len(image) != prompts or not all(isinstance(own, (list, tuple)) for own in image):
                raise ValueError(
                    f"image must hold pictures for all prompts, or one list for each of the {prompts} prompts, "
                    f"got {len(image)} entries"
                )
            return [[to_rgb(f"image[{i}][{k}]", one) for k, one in enumerate(own)] for i, own in enumerate(image)]
        return [[to_rgb(f"image[{k}]", one) for k, one in enumerate(image)]] * prompts
