"""A picture taken apart into layers: `QwenImageLayeredPipeline`, with the call of diffusers' pipeline of that name.

Source: Qwen-Image-Layered, arXiv 2512.15603. The image stream holds the whole picture, its layers from back to front
and the given picture; all are RGBA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.models.text_encoder import CAPTION_CHINESE, CAPTION_ENGLISH
from qwen_image_fast.models.vision import write_caption
from qwen_image_fast.pictures import Picture, to_rgba
from qwen_image_fast.pipelines.arguments import Arguments, per_prompt, whole
from qwen_image_fast.pipelines.base import QwenImagePipelineOutput
from qwen_image_fast.pipelines.conditions import encode_reference_latents, fit
from qwen_image_fast.pipelines.editing import EditingPipeline
from qwen_image_fast.pipelines.images import area_size, resize
from qwen_image_fast.pipelines.in_parts import Denoising, Parts, in_parts
from qwen_image_fast.pipelines.latents import decode_latents, stacked, to_output
from qwen_image_fast.sampling import Sample


class QwenImageLayeredPipeline(EditingPipeline):
    """RGBA layers of pictures. The condition encoder is loaded with its head, for captions."""

    writes_captions = True

    @in_parts
    def __call__(
        self,
        image: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        layers: int = 4,
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
        resolution: int = 640,
        cfg_normalize: bool = False,
        use_en_prompt: bool = False,
        *,
        preserve_size: bool = False,
        seed: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Parts:
        """Take pictures apart. Further arguments: `QwenImagePipeline.__call__`.

        Args:
            image: one for all prompts, or a list with one for each prompt; transparency is kept.
            prompt: a caption of the whole picture; without one, or where it is blank, Qwen2.5-VL writes it.
            layers: how many.
            resolution: 640 or 1024; the layers have about its square in pixels, in multiples of 32.
            cfg_normalize: rescale guidance to the norm of the branch with the prompt.
            use_en_prompt: captions in English; else in Chinese, as the model was trained.
            preserve_size: the layers keep the picture's exact size instead; the model was not trained for all sizes.
            latents: packed noise of all layers and the whole picture, which comes first.

        Returns:
            For every image its layers, back to front, RGBA; as arrays or tensors stacked, PIL images in a list.

        Raises:
            ValueError, TypeError: bad arguments, in one sentence; also when the result is not finite.
        """
        call = Arguments.of(locals())
        resolution, layers = whole(resolution), whole(layers)
        if resolution not in (640, 1024):
            raise ValueError(f"resolution must be 640 or 1024, got {resolution}")
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"layers must be an integer of at least 1, got {layers}")
        if image is None:
            raise ValueError("image must be given, got None")
        if call.prompt is None and call.prompt_embeds is None:
            several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
            call.prompt = [""] * (len(image) if several else 1)
        self._begin(call)
        pictures = [to_rgba("image", one) for one in per_prompt("image", image, self._count(call))]
        pixels = [p.size[::-1] if preserve_size else area_size(resolution**2, *p.size)[::-1] for p in pictures]
        latent = [self._latent_size(size, preserve_size) for size in pixels]
        self._say_size(latent)
        pictures = [resize(p, w, h) for p, (h, w) in zip(pictures, pixels)]
        if call.prompt is not None:
            prompts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
            with self._stage("caption"):
                call.prompt = [
                    text if text.strip() else self.get_image_caption(picture, use_en_prompt)
                    for text, picture in zip(prompts, pictures)
                ]
        if call.sigmas is None:
            call.sigmas = np.linspace(1.0, 0, call.num_inference_steps + 1)[:-1].tolist()

        cond, uncond = self._conditions(call)
        each = call.num_images_per_prompt
        with self._stage("encode"):
            fitted = [fit(p, s, t, self.vae_scale_factor, preserve_size) for p, s, t in zip(pictures, pixels, latent)]
            references = [encode_reference_latents(self.vae, [picture]) for picture in fitted]
        sizes = [size for size in latent for _ in range(each)]
        generator, seeds = self._generators(call, len(cond))
        samples = []
        for i, (x, (h, w)) in enumerate(zip(self._noise(call, sizes, generator, layers + 1), sizes)):
            shape, reference = (1, h // 2, w // 2), references[i // each]
            samples.append(
                Sample(
                    x, shape, cond[i], None if uncond is None else uncond[i],
                    [t.to(self.device, self.dtype) for t in reference.latents], reference.shapes,
                    layers=layers + 1, mu=(shape[1] * shape[2] / 256) ** 0.5,
                )
            )  # fmt: skip
        tokens = yield Denoising(call, samples, {"rescale": cfg_normalize})
        if call.output_type == "latent":
            return self._finish(call, tokens, sizes, seeds)
        images = []
        with self._stage("decode"):
            for i, (t, (h, w)) in enumerate(zip(tokens, sizes)):
                crop = pixels[i // each] if preserve_size else (h * self.vae_scale_factor, w * self.vae_scale_factor)
                planes = [decode_latents(self.vae, layer, h, w) for layer in t.chunk(layers + 1)[1:]]
                images.append(stacked([to_output(p[:, : crop[0], : crop[1]], call.output_type) for p in planes]))
        return QwenImagePipelineOutput(images, seeds, call.prompt) if call.return_dict else (images,)

    def get_image_caption(self, picture: Image.Image, use_en_prompt: bool = True) -> str:
        """What Qwen2.5-VL writes about a picture, in English or in Chinese."""
        prompt = CAPTION_ENGLISH if use_en_prompt else CAPTION_CHINESE
        return write_caption(self.text_encoder, self.tokenizer, picture.convert("RGB"), self.processor, prompt)
