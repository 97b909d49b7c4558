"""Pictures as users have them -> upright pictures of 8 bits a channel. Needs no torch."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qwen_image_fast.folders import nearest_file
from qwen_image_fast.once import warn_once

logger = logging.getLogger(__name__)

Picture = Any  # a path, a file's bytes, a PIL image, array or tensor
# Of these a second frame may be meant. An MPO is a phone's photograph with its preview.
_WITH_FRAMES = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")


def decode(
    name: str, source: str | os.PathLike | bytes, *, largest: int | None = None, frames: bool = True
) -> Image.Image:
    """A picture file as PIL decodes it, turned as its EXIF entry says; of several frames or pages the first, which is
    said in a warning.

    Args:
        name: begins the sentences of errors. source: a path, or what the file holds.
        largest: pixels beyond which it is not decoded; None: PIL's limit, 179 million.
        frames: whether it may have several.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, damaged or no picture, larger than `largest`, or has several frames against `frames`.
    """
    if isinstance(source, str) and "://" in source:
        raise ValueError(f"{name} must be a file, an address is not fetched, got {source}")
    if isinstance(source, bytes) and not source:
        raise ValueError(f"{name} could not be read as a picture: it is empty")
    if not isinstance(source, bytes) and not os.path.exists(source):
        raise FileNotFoundError(f"{name}: there is no picture {os.fspath(source)}{nearest_file(source)}")
    with _reading(name), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if largest is not None and image.width * image.height > largest:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {largest}")
        if (count := _frames(image)) > 1 and not frames:
            raise ValueError(f"it has {count} frames or pages")
        _say_frames(name, image)
        image.load()
        return ImageOps.exif_transpose(image)


def to_rgb(name: str, image: Picture) -> Image.Image:
    """An upright 8-bit RGB picture.

    A file, by its path or its bytes, as `decode` reads it. A PIL image: turned as its EXIF entry says; of an animation
    the frame it stands at, which is the first of a file just opened; transparency over white; 16-bit, 32-bit and
    floating-point grey scaled to 8 bits; palette, grey and CMYK converted. An array [H, W], [H, W, 1], [H, W, 3] or
    [H, W, 4], or a tensor [H, W] or [C, H, W]: uint8, bool, or floating point in [0, 1], or, where any is negative, in
    [-1, 1], as diffusers takes them. One of a batch of one.

    Raises:
        TypeError: something else. ValueError: no pixels, another shape, values out of range, or a damaged file.
        FileNotFoundError: there is no such file.
    """
    return _over("white", name, _upright(name, image))


def to_mask(name: str, image: Picture) -> Image.Image:
    """As `to_rgb`, but transparency over black: what is clear in a mask does not change. Zeros and ones, of any type of
    whole numbers, are black and white."""
    if not isinstance(image, (Image.Image, str, os.PathLike, bytes)):
        image = _to_array(name, image)
        if np.issubdtype(image.dtype, np.integer) and image.size and image.min() >= 0 and image.max() <= 1:
            image = image.astype(bool)
        return _over("black", name, _upright(name, image))
    mask = _over("black", name, _upright(name, image, mask=True))
    return mask.point(lambda value: 255 * value) if np.asarray(mask).max() == 1 else mask


def to_rgba(name: str, image: Picture) -> Image.Image:
    """As `to_rgb`, but with its transparency; opaque where there is none."""
    picture = _upright(name, image)
    with _reading(name):
        return (picture if picture.has_transparency_data else picture.convert("RGB")).convert("RGBA")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """One sentence for what PIL raises: of damaged files a dozen types."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        reason: object = error
        if isinstance(error, UnidentifiedImageError):
            reason = "its type is not known"
        elif isinstance(error, IsADirectoryError):
            reason = "it is a folder"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror  # without the number of the error
        raise ValueError(f"{name} could not be read as a picture: {reason}") from error


def _frames(image: Image.Image) -> int:
    """Frames or pages of a file; 1 where to count them would read it again, and undo what was drawn on it."""
    known = "n_frames" in vars(image) or getattr(image, "tile", None)
    return getattr(image, "n_frames", 1) if known and image.format in _WITH_FRAMES else 1


def _say_frames(name: str, image: Image.Image) -> None:
    if (count := _frames(image)) > 1:
        warn_once(logger, logger, "%s has %d frames or pages: number %d is used", name, count, image.tell() + 1)


def _upright(name: str, image: Picture, mask: bool = False) -> Image.Image:
    """A PIL image with 8 bits a channel, turned as its EXIF entry says."""
    picture = _to_pil(name, image)
    if picture.width == 0 or picture.height == 0:
        raise ValueError(f"{name} must have pixels, got {picture.width}x{picture.height}")
    with _reading(name):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        deep, picture = picture, _from_array(name, _grey_to_unit(picture, mask))
        if (value := deep.info.get("transparency")) is not None:
            picture.putalpha(Image.fromarray(np.uint8(255) * (np.asarray(deep) != value)))
    return picture


def _over(ground: str, name: str, picture: Image.Image) -> Image.Image:
    with _reading(name):  # PIL converts some rare modes to no other
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
        return picture.convert("RGB")


def _to_pil(name: str, image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        _say_frames(name, image)
        return image
    if isinstance(image, (str, os.PathLike, bytes)):
        return decode(name, image)
    return _from_array(name, _to_array(name, image))


def _to_array(name: str, image: Any) -> np.ndarray:
    """An array, or a tensor as an array with its channels last."""
    if getattr(image, "ndim", 0) == 4 and len(image) == 1:
        image = image[0]
    if hasattr(image, "detach"):
        shape = tuple(image.shape)
        if image.dim() not in (2, 3):
            raise ValueError(f"{name} must be a tensor [channels, height, width] or [height, width], got {shape}")
        if image.dim() == 3 and shape[0] not in (1, 3, 4) and shape[2] in (1, 3, 4):
            raise ValueError(
                f"{name} must be a tensor [channels, height, width], got {shape}: turn it with .permute(2, 0, 1), or "
                "pass it as an array"
            )
        image = image.detach().cpu()
        image = image.movedim(0, -1) if image.dim() == 3 else image
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} must be a file, a PIL image, an array or a tensor, got {type(image).__name__}")
    return image


def _from_array(name: str, array: np.ndarray) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"{name} must be [height, width] or [height, width, 1, 3 or 4], got the shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.size and np.isfinite(array).all() and array.min() >= -1 and array.max() <= 1):
            raise ValueError(
                f"{name} must hold pixels in [0, 1], or in [-1, 1], where they are floating point, got others or none"
            )
        array = array if array.min() >= 0 else array / 2 + 0.5
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, or floating point in [0, 1], got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} must have pixels, got {array.shape[1]}x{array.shape[0]}")
    return Image.fromarray(np.ascontiguousarray(array))


def _grey_to_unit(picture: Image.Image, mask: bool) -> np.ndarray:
    """16-bit grey to [0, 1]. Of 32-bit and floating-point grey the largest value tells what white is: 255 (as PIL
    converts pictures), 65535, or of floating point and of a mask 1."""
    array = np.asarray(picture).astype(np.float64)
    top, white = array.max(initial=0), 65535.0
    if top <= 1 and (mask or picture.mode == "F"):
        white = 1.0
    elif picture.mode in ("I", "F") and top <= 255:
        white = 255.0
    return np.clip(array / white, 0, 1)
