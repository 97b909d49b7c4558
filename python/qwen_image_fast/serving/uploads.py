"""Pictures that come with a request: limited before they are decoded, and nothing of them kept but their pixels."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from qwen_image_fast.pictures import decode, to_rgb, to_rgba
from qwen_image_fast.serving.errors import ApiError, invalid
from qwen_image_fast.serving.settings import Limits

FORMATS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}


def format_of(content: bytes) -> str | None:
    """By its first bytes, whatever a client calls it."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return next((name for start, name in FORMATS.items() if content.startswith(start)), None)


def open_picture(name: str, content: bytes, limits: Limits, *, transparent: bool = False) -> Image.Image:
    """An upright picture, RGB or RGBA, without metadata.

    Raises:
        ApiError: 400, or 413 where it is too large; said before it is decoded.
    """
    param = name.partition("[")[0]
    if len(content) > limits.file_bytes:
        text = f"{name} must have at most {limits.file_bytes} bytes, got {len(content)}"
        raise ApiError(413, text, "too_large", param)
    kind = format_of(content)
    if kind is None:
        raise invalid(f"{name} must be a PNG, JPEG or WebP picture", param, "invalid_image")
    try:
        with Image.open(io.BytesIO(content), formats=[kind]) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        width = height = limits.side_in + 1  # more than Pillow opens
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise invalid(f"{name} could not be read as a picture: {error}", param, "invalid_image") from error
    if width * height > limits.pixels_in or max(width, height) > limits.side_in:
        text = f"{name} must have at most {limits.pixels_in} pixels and {limits.side_in} a side"
        raise ApiError(413, text, "too_large", param)
    try:
        image = decode(name, content, largest=limits.pixels_in, frames=False)
        image = (to_rgba if transparent else to_rgb)(name, image)
    except (ValueError, MemoryError) as error:
        raise invalid(str(error), param, "invalid_image") from error
    clean = Image.frombytes(image.mode, image.size, image.tobytes())
    return clean


def open_mask(content: bytes, picture: Image.Image, limits: Limits) -> Image.Image:
    """OpenAI's mask, transparent where the picture may change -> white there, black elsewhere."""
    if format_of(content) == "JPEG":
        raise invalid("mask must be a PNG or WebP that is transparent where the picture may change, got a JPEG", "mask")
    with_alpha = open_picture("mask", content, limits, transparent=True)
    if with_alpha.size != picture.size:
        got, wanted = ("x".join(map(str, size)) for size in (with_alpha.size, picture.size))
        raise invalid(f"mask must have the size of the picture, {wanted}, got {got}", "mask", "invalid_image")
    alpha = with_alpha.getchannel("A")
    if (least := int(np.asarray(alpha).min())) > 127:
        raise invalid(
            f"mask must be transparent where the picture may change, alpha at most 127 of 255, got {least} at least",
            "mask",
            "invalid_image",
        )
    return alpha.point(lambda value: 255 - value)


def from_data_url(name: str, url: str, limits: Limits) -> bytes:
    """The bytes of data:image/png;base64,..."""
    head, comma, text = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise invalid(f"{name} must be a data URL in base64, such as data:image/png;base64,...", name, "invalid_image")
    if len(text) * 3 // 4 > limits.file_bytes:
        raise ApiError(413, f"{name} must have at most {limits.file_bytes} bytes", "too_large", name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{name} is not base64: {error}", name, "invalid_image") from error


def encode(image: Image.Image, fields: Any, parameters: dict[str, Any] | None) -> bytes:
    """A picture in the asked format; a PNG says what it was made with."""
    file = io.BytesIO()
    if fields.output_format == "png":
        if parameters is None:
            image.save(file, format="PNG", compress_level=3)
        else:
            from qwen_image_fast.png_metadata import png_writer

            png_writer(image, parameters)(file)
    else:
        quality = 100 if fields.output_compression is None else fields.output_compression
        image = image.convert("RGB") if fields.output_format == "jpeg" else image
        image.save(file, format=fields.output_format.upper(), quality=quality)
    return file.getvalue()
