"""What a picture on its way looks like, without the decoder: a linear map from latents to colours.

The map is fitted to the model's own VAE when it is loaded: drawn pictures are encoded, and the colours of each 8 x 8
pixels are explained by the latents there, by least squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.pipelines.conditions import encode_distribution, normalized
from qwen_image_fast.pipelines.latents import unpack_latents
from qwen_image_fast.sampling import Track

SIDE, PICTURES = 256, 3


def drawn(seed: int, side: int = SIDE) -> Tensor:
    """A picture [1, 3, 1, side, side] in [-1, 1] with smooth fields of all colours and areas with hard edges."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    colours = torch.rand(1, 3, 6, 6, generator=generator).where(torch.rand(1, 1, 6, 6, generator=generator) < 0.7, 1.0)
    areas = F.interpolate(colours, size=(side, side), mode="nearest")
    half = torch.arange(side) < side // 3
    return (torch.where(half, smooth, areas) * 2 - 1)[:, :, None]


class Previews:
    """colours = [latents, 1] matrix, for each latent pixel."""

    def __init__(self, vae: Any):
        found, aims = [], []
        for pixels in (drawn(seed) for seed in range(PICTURES)):
            if getattr(vae.config, "input_channels", 3) == 4:  # opaque
                pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
            latents = normalized(vae, encode_distribution(vae, pixels).mode())[0, :, 0].float().cpu()
            found.append(latents.flatten(1))
            aims.append(F.interpolate(pixels[:, :3, 0], size=latents.shape[-2:], mode="area")[0].flatten(1))
        rows, colours = torch.cat(found, 1), torch.cat(aims, 1)
        rows = torch.cat([rows, torch.ones_like(rows[:1])]).T
        # A little of ridge: a channel that is constant must not become a large number.
        square = rows.T @ rows + 1e-2 * torch.eye(rows.shape[1])
        self.matrix = torch.linalg.solve(square, rows.T @ colours.T)

    def of(self, track: Track, before: Tensor) -> np.ndarray:
        """uint8 [latent height, latent width, 3] of the picture that the step just taken aims at.

        before: the latents before that step. With x' = x + (sigma' - sigma) v the aim is x - sigma v.
        """
        sigma, after = float(track.levels[track.step - 1]), float(track.levels[track.step])
        aim = before.float() - sigma * (track.latents.float() - before.float()) / (after - sigma)
        _, height, width = track.sample.shape
        tokens = height * width
        latents = unpack_latents(aim[None, :tokens], 2 * height, 2 * width)[0, :, 0].cpu()
        rows = torch.cat([latents, torch.ones(1, *latents.shape[-2:])]).movedim(0, -1)
        return ((rows @ self.matrix / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def preview_steps(steps: int, count: int) -> list[int]:
    """After which steps `count` previews are shown: the first after the third at the latest, then evenly.

    Fewer where there are fewer steps; never after the last, whose picture follows.
    """
    first = min(3, steps - 1)
    if count < 1 or first < 1:
        return []
    return sorted({first + (steps - first) * k // count for k in range(count)} & set(range(1, steps)))
