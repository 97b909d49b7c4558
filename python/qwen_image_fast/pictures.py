"""Pictures as users have them -> upright pictures of 8 bits a channel. Needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

Picture = Any  # a PIL image, array or tensor


def to_rgb(name: str, image: Picture) -> Image.Image:
    """An upright 8-bit RGB picture.

    A PIL image: turned as its EXIF entry says; of an animation the frame it stands at, which is the first of a file
    just opened; transparency over white; 16-bit, 32-bit and floating-point grey scaled to 8 bits; palette, grey and
    CMYK converted. An array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or a tensor [H, W] or [C, H, W]: uint8, or
    floating point in [0, 1].

    Raises:
        TypeError: something else. ValueError: no pixels, another shape, values out of range, or a damaged file.
    """
    return _over("white", _upright(name, image))


def to_mask(name: str, image: Picture) -> Image.Image:
    """As `to_rgb`, but transparency over black: what is clear in a mask does not change."""
    return _over("black", _upright(name, image))


def to_rgba(name: str, image: Picture) -> Image.Image:
    """As `to_rgb`, but with its transparency; opaque where there is none."""
    picture = _upright(name, image)
    return (picture if picture.has_transparency_data else picture.convert("RGB")).convert("RGBA")


def _upright(name: str, image: Picture) -> Image.Image:
    """A PIL image with 8 bits a channel, turned as its EXIF entry says."""
    picture = _to_pil(name, image)
    if picture.width == 0 or picture.height == 0:
        raise ValueError(f"{name} must have pixels, got {picture.width}x{picture.height}")
    try:
        picture = ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} could not be read as a picture: {error}") from error
    if picture.mode.startswith(("I", "F")):
        deep, picture = picture, _from_array(name, _grey_to_unit(picture))
        if (value := deep.info.get("transparency")) is not None:
            picture.putalpha(Image.fromarray(np.uint8(255) * (np.asarray(deep) != value)))
    return picture


def _over(ground: str, picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
    return picture.convert("RGB")


def _to_pil(name: str, image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if hasattr(image, "detach"):
        if image.dim() not in (2, 3):
            raise ValueError(
                f"{name} must be a tensor [channels, height, width] or [height, width], got the shape "
                f"{tuple(image.shape)}"
            )
        image = image.detach().cpu()
        image = image.movedim(0, -1) if image.dim() == 3 else image
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} must be a PIL image, an array or a tensor, got {type(image).__name__}")
    return _from_array(name, image)


def _from_array(name: str, array: np.ndarray) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"{name} must be [height, width] or [height, width, 1, 3 or 4], got the shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.size and np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{name} must hold pixels in [0, 1] where they are floating point, got others or none")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, or floating point in [0, 1], got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} must have pixels, got {array.shape[1]}x{array.shape[0]}")
    return Image.fromarray(np.ascontiguousarray(array))


def _grey_to_unit(picture: Image.Image) -> np.ndarray:
    """16-bit grey to [0, 1]. Of 32-bit and floating-point grey the largest value tells what white is: 255 (as PIL
    converts pictures), 65535, or of floating point 1."""
    array = np.asarray(picture).astype(np.float64)
    top, white = array.max(initial=0), 65535.0
    if picture.mode == "F" and top <= 1:
        white = 1.0
    elif picture.mode in ("I", "F") and top <= 255:
        white = 255.0
    return np.clip(array / white, 0, 1)
