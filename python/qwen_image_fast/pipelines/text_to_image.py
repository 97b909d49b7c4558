"""Text to image: `QwenImagePipeline`, with the call of diffusers' pipeline of that name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.pipelines.arguments import Arguments
from qwen_image_fast.pipelines.generation import GenerationPipeline
from qwen_image_fast.pipelines.in_parts import Denoising, Parts, in_parts
from qwen_image_fast.sampling import Sample


class QwenImagePipeline(GenerationPipeline):
    """Text to image with true classifier-free guidance, on packed batches."""

    encodes_pictures = False

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
        """Make images. In a batch, every image equals the one made alone within the rounding of library GEMMs.

        Args:
            prompt: one or several. negative_prompt: one for all, or one for each prompt; without it there is no
                guidance (" " is the usual choice). true_cfg_scale: guidance, in use above 1.
            height, width: pixels, multiples of 16 (default 1024); lists give every prompt its own size.
            num_inference_steps, sigmas: the schedule; sigmas before shifting, in (0, 1], falling.
            num_images_per_prompt: images of each prompt, one after another in the result.
            generator: one for the batch or one for each image, as in diffusers. seed: an integer, image i then has
                seed + i, or one for each image; the same noise as diffusers with a CPU generator of that seed. With
                neither, seeds are drawn and reported.
            latents: packed noise [images, tokens, channels], or a list of [tokens, channels].
            prompt_embeds, prompt_embeds_mask (and negative): [prompts, tokens, width] and what counts in them, or a
                list of unpadded [tokens, width].
            output_type: "pil" (a list), "np" (float32 [images, H, W, C] in [0, 1]), "pt" ([images, C, H, W]) or
                "latent" (packed [images, tokens, channels]); a list where sizes differ.
            callback_on_step_end: f(pipe, step, timestep, {"latents": ...}) -> dict, as in diffusers.
            max_sequence_length: prompt tokens kept, at most 1024.
            guidance_scale: for diffusers' signature; no released model uses it.
            attention_kwargs: `{"scale": s}` weighs the active LoRAs by s in this call.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        self._begin(call)
        cond, uncond = self._conditions(call)
        sizes = self._sizes(call, height, width)
        self._say_size(sizes)
        generator, seeds = self._generators(call, len(cond))
        samples = [
            Sample(x, (1, h // 2, w // 2), cond[i], None if uncond is None else uncond[i])
            for i, (x, (h, w)) in enumerate(zip(self._noise(call, sizes, generator), sizes))
        ]
        tokens = yield Denoising(call, samples, {})
        return self._finish(call, tokens, sizes, seeds)
