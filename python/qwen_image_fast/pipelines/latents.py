"""Between pictures and packed latent tokens: noise, packing, and what the decoder returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pack_latents(latents: Tensor) -> Tensor:
    """[B, 1, C, H, W] or [B, C, 1, H, W] latents -> [B, H/2 * W/2, 4 C] tokens: 2x2 patches, channel-major inside."""
    batch, height, width = latents.shape[0], *latents.shape[-2:]
    patches = latents.reshape(batch, -1, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, height/2 * width/2, 4 C] tokens -> [B, C, 1, height, width] latents."""
    patches = tokens.unflatten(-1, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 1, height, width)


def draw_noise(
    sizes: Sequence[tuple[int, int]],
    channels: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    dtype: torch.dtype,
    device: torch.device,
    layers: int = 1,
) -> list[Tensor]:
    """Packed noise of every image, [layers * tokens, 4 * channels]; `sizes` are latent heights and widths.

    As diffusers draws it: in the model's dtype, on the generator's device; a list of generators draws image by image,
    one generator draws a batch of equal sizes at once (and images of different sizes one after another).
    """

    def draw(count: int, size: tuple[int, int], source: torch.Generator | None) -> Tensor:
        where = device if source is None else source.device
        noise = torch.randn(count, layers, channels, *size, generator=source, dtype=dtype, device=where)
        return pack_latents(noise.to(device).flatten(0, 1)[:, None]).unflatten(0, (count, layers)).flatten(1, 2)

    if generator is None or isinstance(generator, torch.Generator):
        if len(set(sizes)) == 1:
            return list(draw(len(sizes), sizes[0], generator))
        return [draw(1, size, generator)[0] for size in sizes]
    return [draw(1, size, g)[0] for size, g in zip(sizes, generator, strict=True)]


def latent_statistics(vae, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the VAE's latents [1, channels, 1, H, W]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def decode_latents(vae, tokens: Tensor, height: int, width: int) -> Tensor:
    """One image's tokens [L, 4 C] -> [channels, 8 height, 8 width] in [-1, 1]; height and width in latent pixels."""
    latents = unpack_latents(tokens[None], height, width).to(vae.dtype)
    mean, std = latent_statistics(vae, latents)
    return vae.decode(latents * std + mean, return_dict=False)[0][0, :, 0]


def stacked(images: list[Any]) -> Any:
    """Arrays or tensors of one shape as one, with a first axis more; anything else as it is."""
    if not images or len({getattr(image, "shape", None) for image in images}) != 1:
        return images
    if isinstance(images[0], Tensor):
        return torch.stack(images)
    return np.stack(images) if isinstance(images[0], np.ndarray) else images


def to_output(image: Tensor, output_type: str):
    """[channels, H, W] in [-1, 1] -> PIL image, float32 array [H, W, channels] in [0, 1], or tensor in [0, 1]."""
    image = (image / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return image
    array = image.permute(1, 2, 0).float().cpu().numpy()
    if output_type == "np":
        return array
    return Image.fromarray((array * 255).round().astype("uint8"))
