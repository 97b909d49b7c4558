"""What image-to-image and the inpaintings share: a start from a noised picture, kept where the mask is black."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen_image_fast.pictures import Picture, to_mask, to_rgb
from qwen_image_fast.pipelines.arguments import Arguments, per_prompt, whole
from qwen_image_fast.pipelines.base import QwenImagePipelineOutput
from qwen_image_fast.pipelines.conditions import encode_distribution, first_step, fit, mask_tokens, normalized
from qwen_image_fast.pipelines.generation import GenerationPipeline
from qwen_image_fast.pipelines.images import resize, to_tensor
from qwen_image_fast.pipelines.in_parts import Denoising, Parts
from qwen_image_fast.pipelines.latents import pack_latents
from qwen_image_fast.pipelines.masks import (
    Box,
    check_ratio,
    check_reach,
    check_white,
    crop_region,
    paste_back,
    resize_and_fill,
)
from qwen_image_fast.sampling import Sample

logger = logging.getLogger(__name__)


class StartingPipeline(GenerationPipeline):
    """A pipeline that starts from a picture for each prompt."""

    encodes_pictures = True

    def _pictures(self, image: Picture | Sequence[Picture] | None, prompts: int) -> list[Image.Image]:
        """One RGB picture for each prompt."""
        if image is None:
            raise ValueError("image must be given, got None")
        return [to_rgb("image", one) for one in per_prompt("image", image, prompts)]

    def _masks(self, pictures: Sequence[Image.Image], mask_image: Any) -> list[Image.Image]:
        """One mask for each picture, in its size; a mask of the same aspect ratio is resized."""
        if mask_image is None:
            raise ValueError("mask_image must be given, got None")
        masks = [to_mask("mask_image", one) for one in per_prompt("mask_image", mask_image, len(pictures))]
        for i, (mask, picture) in enumerate(zip(masks, pictures)):
            check_ratio(_mask_name(i, masks), mask, picture)
            check_white(_mask_name(i, masks), mask)
        return [resize(mask, *picture.size) for mask, picture in zip(masks, pictures)]

    def _change(
        self,
        call: Arguments,
        pictures: Sequence[Image.Image],
        pixels: list[tuple[int, int]],
        *,
        strength: float,
        preserve_size: bool,
        masks: Sequence[Image.Image] | None = None,
        padding_mask_crop: int | None = None,
        encode: Callable[[Sequence[str]], list[Tensor]] | None = None,
        as_reference: bool = False,
    ) -> Parts:
        """The call, from the RGB pictures of each prompt on, which become images of `pixels`, height and width.

        `as_reference`: the picture's latents also stand behind the image in the sequence.
        """
        steps = call.num_inference_steps if call.sigmas is None else len(call.sigmas)
        begin, each, scale = first_step(steps, strength), call.num_images_per_prompt, self.vae_scale_factor
        latent = [self._latent_size(size, preserve_size) for size in pixels]
        self._say_size(latent)
        boxes: list[Box] = []
        if padding_mask_crop is not None:
            assert masks is not None
            padding_mask_crop = whole(padding_mask_crop)
            if not isinstance(padding_mask_crop, int) or padding_mask_crop < 0:
                raise ValueError(f"padding_mask_crop must be an integer of at least 0, got {padding_mask_crop}")
            if call.output_type != "pil":
                raise ValueError(f"output_type must be 'pil' with padding_mask_crop, got {call.output_type!r}")
            boxes = [crop_region(m, w, h, padding_mask_crop) for m, (h, w) in zip(masks, pixels)]

        def fitted(images: Sequence[Image.Image]) -> list[Image.Image]:
            if boxes:
                sides = [(w * scale, h * scale) for h, w in latent]
                return [resize_and_fill(image.crop(box), *side) for image, box, side in zip(images, boxes, sides)]
            return [fit(image, p, size, scale, preserve_size) for image, p, size in zip(images, pixels, latent)]

        changes = [mask_tokens(m, *size, self.vae.z_dim) for m, size in zip(fitted(masks or []), latent)]
        for i, (mask, (h, w)) in enumerate(zip(changes, pixels)):
            check_reach(_mask_name(i, changes), bool(mask.any()), w, h)
        cond, uncond = self._conditions(call, encode, [[p] for p in pictures])
        sizes = [size for size in latent for _ in range(each)]
        generator, seeds = self._generators(call, len(cond))
        with self._stage("encode"):
            images = self._encode(fitted(pictures), each, generator) if call.latents is None or masks else None
        noise = self._noise(call, sizes, generator)
        samples = []
        for i, (x, (h, w)) in enumerate(zip(noise, sizes)):
            sample = Sample(x, (1, h // 2, w // 2), cond[i], None if uncond is None else uncond[i])
            sample.image = None if images is None else images[i]
            if as_reference and images is not None:
                sample.references, sample.reference_shapes = [images[i]], [sample.shape]
            samples.append(sample)
        for i, mask in enumerate(m.to(self.device, self.dtype) for m in changes):
            for sample in samples[i * each : (i + 1) * each]:
                sample.mask = mask
        tokens = yield Denoising(call, samples, {"begin": begin})
        crops = [size for size in pixels for _ in range(each)] if preserve_size and not boxes else None
        output = self._finish(call, tokens, sizes, seeds, crops)
        if boxes and masks:
            found = output.images if isinstance(output, QwenImagePipelineOutput) else output[0]
            found[:] = [
                paste_back(image, pictures[i // each], masks[i // each], boxes[i // each])
                for i, image in enumerate(found)
            ]
        return output

    def _encode(self, pictures: Sequence[Image.Image], each: int, generator) -> list[Tensor]:
        """Packed latents of every image, drawn from the VAE's distribution, before its noise, by the same generator."""
        single = generator is None or isinstance(generator, torch.Generator)
        latents = []
        for i, picture in enumerate(pictures):
            distribution = encode_distribution(self.vae, to_tensor(picture))
            for k in range(i * each, (i + 1) * each):
                drawn = distribution.sample(generator if single else generator[k])
                latents.append(pack_latents(normalized(self.vae, drawn))[0].to(self.device, self.dtype))
        return latents


def _mask_name(i: int, masks: Sequence[Any]) -> str:
    return "mask_image" if len(masks) == 1 else f"mask_image[{i}]"
