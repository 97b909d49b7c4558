"""The sizes of pictures that models take, and their pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def area_size(area: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of about `area` pixels in the ratio of the given ones, rounded to multiples of 32.

    diffusers' `calculate_dimensions`: Python's rounding, half to even.
    """
    ratio = width / height
    new_width = math.sqrt(area * ratio)
    return max(32, round(new_width / 32) * 32), max(32, round(new_width / ratio / 32) * 32)


def shrink(image: Image.Image, area: int) -> Image.Image:
    """The picture itself, or, where it has more than `area` pixels, resized to `area_size`."""
    if image.width * image.height <= area:
        return image
    return resize(image, *area_size(area, image.width, image.height))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Lanczos, as diffusers resizes pictures; the picture itself where it has that size."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def pad_to_multiple(image: Image.Image, multiple: int = 16) -> Image.Image:
    """Grown to the right and the bottom by repeating the last column and row; no pixel moves or changes."""
    right, bottom = -image.width % multiple, -image.height % multiple
    if not right and not bottom:
        return image
    pixels = np.asarray(image)
    edges = ((0, bottom), (0, right)) + ((0, 0),) * (pixels.ndim - 2)
    return Image.fromarray(np.pad(pixels, edges, mode="edge"))


def to_tensor(image: Image.Image) -> Tensor:
    """A picture -> float32 [1, channels, 1, H, W] in [-1, 1], what the VAE takes."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return 2 * pixels.movedim(-1, 0)[None, :, None] - 1
