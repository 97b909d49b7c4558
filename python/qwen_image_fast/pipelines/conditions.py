"""What stands beside the prompt: reference pictures, in the text and in the image stream.

A reference goes two ways (Qwen-Image report, arXiv 2508.02324, section 2.2): through Qwen2.5-VL into the text, for what
it means, and through the VAE behind the generated image's tokens, for what it looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.models.text_encoder import (
    EDIT_DROP,
    EDIT_PLUS_DROP,
    EDIT_PLUS_PICTURE,
    EDIT_PLUS_TEMPLATE,
    EDIT_TEMPLATE,
)
from qwen_image_fast.models.vision import IMAGE_TOKEN, Seen, VisionProcessor, encode_pictures, look
from qwen_image_fast.pictures import Picture, to_rgb
from qwen_image_fast.pipelines.images import area_size, pad_to_multiple, resize, shrink, to_tensor
from qwen_image_fast.pipelines.latents import latent_statistics, pack_latents
from qwen_image_fast.pipelines.masks import check_reach

CONDITION_AREA = 384 * 384  # of Edit-Plus' pictures for Qwen2.5-VL
VAE_AREA = 1024 * 1024


class Reference(NamedTuple):
    """A picture as the two encoders see it."""

    condition: Image.Image
    vae: Image.Image


class References(NamedTuple):
    """The references of one sample in the image stream: packed latents and shapes in tokens."""

    latents: list[Tensor]
    shapes: list[ImageShape]


def prepare_reference(image: Image.Image, *, preserve_size: bool, condition_area: int, multiple: int = 16) -> Reference:
    """The picture for Qwen2.5-VL and the one for the VAE.

    `preserve_size`: the VAE sees the picture as it is, padded on the right and at the bottom to the next multiple of
    16 by repeating its edge; Qwen2.5-VL sees it as it is up to `condition_area` pixels, and resized to that if larger.
    Otherwise both are resized as in diffusers, smaller pictures too: to `condition_area` and to one megapixel, sides
    rounded to multiples of 32, which changes the aspect ratio a little.
    """
    if condition_area < 1:
        raise ValueError(f"condition_area must be at least 1, got {condition_area}")
    if preserve_size:
        return Reference(shrink(image, condition_area), pad_to_multiple(image, multiple))
    condition = resize(image, *area_size(condition_area, *image.size))
    return Reference(condition, resize(image, *area_size(VAE_AREA, *image.size)))


def edit_prompt(prompt: str, pictures: int, plus: bool) -> str:
    """The prompt in the template of Edit (one picture) or Edit-Plus (any number, none too)."""
    if IMAGE_TOKEN in prompt:
        raise ValueError(f"prompt must not contain {IMAGE_TOKEN}, which stands for a picture")
    if not plus:
        return EDIT_TEMPLATE.format(prompt)
    return EDIT_PLUS_TEMPLATE.format("".join(EDIT_PLUS_PICTURE.format(n + 1) for n in range(pictures)) + prompt)


def encode_edit_prompts(
    text_encoder: Any,
    tokenizer: Any,
    processor: VisionProcessor,
    prompts: Sequence[str],
    images: Sequence[Sequence[Picture]],
    *,
    plus: bool = True,
    preserve_size: bool = True,
    condition_area: int = CONDITION_AREA,
    grid_positions: bool = True,
    one_batch: bool = False,
) -> list[Tensor]:
    """The conditions of edits, exactly as the editing pipelines make them; for training and for caching.

    Args:
        text_encoder: Qwen2.5-VL with its vision tower, in which gradients flow if they are enabled.
        processor: of the pipeline (`pipe.processor`), or `VisionProcessor()`.
        prompts: an instruction for each sample. images: its 0..N pictures: arrays or what else `to_rgb` takes.
        plus: Edit-Plus' template; False: Edit's, with one picture each.
        preserve_size, condition_area, grid_positions: as in the pipelines' call. one_batch: as in `encode_pictures`.

    Returns:
        Per sample the states [tokens, hidden], in the encoder's dtype.
    """
    pictures = [
        [
            prepare_reference(
                to_rgb(f"images[{i}][{k}]", image), preserve_size=preserve_size, condition_area=condition_area
            ).condition
            for k, image in enumerate(own)
        ]
        for i, own in enumerate(images)
    ]
    seen = iter(look(text_encoder, [picture for own in pictures for picture in own], processor))
    return encode_seen(
        text_encoder, tokenizer, prompts, [[next(seen) for _ in own] for own in pictures], plus, grid_positions,
        one_batch,
    )  # fmt: skip


def encode_seen(
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    seen: Sequence[Sequence[Seen]],
    plus: bool,
    grid_positions: bool,
    one_batch: bool = False,
) -> list[Tensor]:
    """As `encode_edit_prompts`, of pictures that the vision tower has seen."""
    texts = [edit_prompt(prompt, len(own), plus) for prompt, own in zip(prompts, seen, strict=True)]
    drop = EDIT_PLUS_DROP if plus else EDIT_DROP
    return encode_pictures(
        text_encoder, tokenizer, texts, seen, drop=drop, grid_positions=grid_positions, one_batch=one_batch
    )


def encode_distribution(vae: Any, pixels: Tensor):
    """The VAE's distribution over latents of [1, channels, 1, H, W] in [-1, 1]."""
    return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist


def normalized(vae: Any, latents: Tensor) -> Tensor:
    """(latents - mean) / std for each channel of [1, z, 1, H, W]."""
    mean, std = latent_statistics(vae, latents)
    return (latents - mean) / std


def encode_reference_latents(vae: Any, images: Sequence[Image.Image]) -> References:
    """Packed latents [tokens, 4 z] and shapes of pictures whose sides are multiples of 16."""
    latents = [normalized(vae, encode_distribution(vae, to_tensor(image)).mode()) for image in images]
    shapes = [(1, x.shape[-2] // 2, x.shape[-1] // 2) for x in latents]
    return References([pack_latents(x)[0] for x in latents], shapes)


def first_step(steps: int, strength: float) -> int:
    """The first of `steps` steps that is taken when an image is changed with `strength` in [0, 1]; 1: all of them."""
    if not isinstance(strength, (int, float, np.number)) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength!r}")
    begin = int(max(steps - min(steps * strength, steps), 0))
    if begin >= steps:
        raise ValueError(f"strength must leave at least one of the {steps} steps, got {strength}")
    return begin


def mask_tokens(mask: Image.Image, height: int, width: int, channels: int) -> Tensor:
    """A grey picture -> float32 [tokens, 4 channels], 1 where it is at least half white; height, width in latents."""
    white = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)[None, None] >= 0.5
    latent = F.interpolate(white.float(), size=(height, width))
    return pack_latents(latent.expand(1, channels, height, width)[:, :, None])[0]


def check_effect(name: str, mask: Image.Image, width: int, height: int, scale: int = 8) -> None:
    """ValueError where a mask changes nothing of a picture that is made in that size, kept to the pixel."""
    latent = -(-height // (2 * scale)) * 2, -(-width // (2 * scale)) * 2
    fitted = fit(mask, (height, width), latent, scale, pad=True)
    check_reach(name, bool(mask_tokens(fitted, *latent, channels=1).any()), width, height)


def fit(image: Image.Image, pixels: tuple[int, int], latent: tuple[int, int], scale: int, pad: bool) -> Image.Image:
    """A picture at the size of its latents, height and width: resized to `pixels` and padded, or resized to it."""
    if pad:
        return pad_to_multiple(resize(image, pixels[1], pixels[0]), 2 * scale)
    return resize(image, latent[1] * scale, latent[0] * scale)
