"""Masks: whether they fit, and inpainting a crop around one: where to cut, how to fill it up and put the result back.

The geometry is that of diffusers' `VaeImageProcessor`, to the pixel.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

Box = tuple[int, int, int, int]  # left, top, right, bottom


def check_ratio(name: str, mask: Image.Image, picture: Image.Image) -> None:
    """ValueError unless the mask has the picture's aspect ratio; one pixel of rounding in either side is the same."""
    if abs(mask.width * picture.height - mask.height * picture.width) > max(*mask.size, *picture.size):
        raise ValueError(
            f"{name} must have the size of its image, {picture.width}x{picture.height}, or its aspect ratio, "
            f"got {mask.width}x{mask.height}"
        )


def check_white(name: str, mask: Image.Image) -> None:
    """ValueError unless a pixel is at least half white: nothing would change."""
    if (most := np.asarray(mask.convert("L")).max()) < 128:
        raise ValueError(
            f"{name} must be white where the picture may change, at least 128 of 255, got {most} at the brightest place"
        )


def check_reach(name: str, changes: bool, width: int, height: int) -> None:
    """ValueError where a mask has no effect on the latents of a picture: `changes` says whether it has."""
    if not changes:
        raise ValueError(
            f"{name} must be white at a latent pixel, the corner of 8 x 8 pixels, of the {width}x{height} picture: "
            "what is white is too small, and nothing would change; make it larger"
        )


def crop_region(mask: Image.Image, width: int, height: int, pad: int) -> Box:
    """The box around everything that is not black, `pad` pixels wider, grown towards the ratio width : height."""
    rows, columns = np.nonzero(np.asarray(mask.convert("L")))
    if not len(rows):
        raise ValueError("mask_image must have white pixels, got a black one")
    left, right = max(int(columns.min()) - pad, 0), min(int(columns.max()) + 1 + pad, mask.width)
    top, bottom = max(int(rows.min()) - pad, 0), min(int(rows.max()) + 1 + pad, mask.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grow(top, bottom, int((right - left) / ratio - (bottom - top)), mask.height)
    else:
        left, right = _grow(left, right, int((bottom - top) * ratio - (right - left)), mask.width)
    return left, top, right, bottom


def _grow(first: int, last: int, by: int, limit: int) -> tuple[int, int]:
    """Grow an interval on both sides, moved into [0, limit]."""
    first, last = first - by // 2, last + by - by // 2
    if last >= limit:
        first, last = first - (last - limit), limit
    if first < 0:
        first, last = 0, last - first
    return first, min(last, limit)


def resize_and_fill(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fit into width x height, centred, the empty strips filled with the nearest row or column."""
    ratio, own = width / height, image.width / image.height
    inner_w = width if ratio < own else image.width * height // image.height
    inner_h = height if ratio >= own else image.height * width // image.width
    inner = image.resize((inner_w, inner_h), Image.Resampling.LANCZOS)
    out = Image.new("RGB", (width, height))
    left, top = width // 2 - inner_w // 2, height // 2 - inner_h // 2
    out.paste(inner, (left, top))
    if ratio < own and top > 0:
        out.paste(inner.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        out.paste(inner.resize((width, top), box=(0, inner_h, width, inner_h)), (0, top + inner_h))
    elif ratio > own and left > 0:
        out.paste(inner.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        out.paste(inner.resize((left, height), box=(inner_w, 0, inner_w, height)), (left + inner_w, 0))
    return out


def paste_back(result: Image.Image, image: Image.Image, mask: Image.Image, box: Box) -> Image.Image:
    """The whole picture: `result` in its box, and outside the mask the original pixels."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    ratio, own = width / height, result.width / result.height
    inner_w = width if ratio > own else result.width * height // result.height
    inner_h = height if ratio <= own else result.height * width // result.width
    inner = Image.new("RGB", (width, height))
    resized = result.resize((inner_w, inner_h), Image.Resampling.LANCZOS)
    inner.paste(resized, (width // 2 - inner_w // 2, height // 2 - inner_h // 2))
    base = Image.new("RGBA", image.size)
    base.paste(inner, (left, top))
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    out = base.convert("RGB").convert("RGBA")
    out.alpha_composite(kept.convert("RGBA"))
    return out.convert("RGB")
