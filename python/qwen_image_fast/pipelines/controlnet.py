"""ControlNets: `QwenImageControlNetPipeline` and `QwenImageControlNetInpaintPipeline`, with diffusers' calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.pictures import Picture
from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.control import ControlPipeline
from qwen_image_fast.pipelines.in_parts import Parts, in_parts


class QwenImageControlNetPipeline(ControlPipeline):
    """Text to image led by control pictures: a union ControlNet with one picture or several, or several ControlNets."""

    @in_parts
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        control_image: Picture | Sequence[Picture] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
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
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Parts:
        """Make images. Further arguments: `QwenImagePipeline.__call__`.

        Args:
            control_image: a picture, resized to the image's size; for several prompts one for all or one for each.
                Several controls of a union ControlNet, or several ControlNets: a list with an entry for each, itself
                one picture for all prompts or a list with one for each (for several prompts of a union ControlNet,
                lists).
            controlnet_conditioning_scale, control_guidance_start, control_guidance_end: weight of a control picture,
                and the share of the steps at which it begins and ends; one for all or one for each.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        self._begin(call)
        return (yield from self._run(
            call, height, width, control_image, None, controlnet_conditioning_scale, control_guidance_start,
            control_guidance_end,
        ))  # fmt: skip


class QwenImageControlNetInpaintPipeline(ControlPipeline):
    """Inpainting by an inpainting ControlNet, which sees the picture without its masked part."""

    @in_parts
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        control_image: Picture | Sequence[Picture] | None = None,
        control_mask: Picture | Sequence[Picture] | None = None,
        controlnet_conditioning_scale: float = 1.0,
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
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Parts:
        """Make images. Further arguments: `QwenImageControlNetPipeline.__call__`.

        Args:
            control_image: the picture; control_mask: white where it is made anew, of the picture's size or aspect
                ratio. One for all prompts or one for each.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        self._begin(call)
        if control_mask is None:
            raise ValueError("control_mask must be given, got None")
        return (yield from self._run(
            call, height, width, control_image, control_mask, controlnet_conditioning_scale, control_guidance_start,
            control_guidance_end,
        ))  # fmt: skip
