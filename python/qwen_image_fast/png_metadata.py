"""Generated pictures as PNG files with what they were made with inside.

One iTXt chunk `parameters` holds a JSON object in UTF-8: the fields of request.py of the picture's kind (its own seed;
the paths of what went in are absolute, with their SHA-256), and

    {"software": "qwen-image-fast", "version": ..., "kind": ..., "device": ..., "layer": of Layered, from 1}

Files of before `kind` have `command` instead, and relative paths. Readers that show PNG text show it as it is; only
this package's own object is read back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from qwen_image_fast.files import Writer, atomic_write, not_text
from qwen_image_fast.request import KINDS, Request, make
from qwen_image_fast.request_fields import RequestError, parse_size

KEYWORD = "parameters"
SOFTWARE = "qwen-image-fast"
# What an object holds beside the fields of its kind.
BESIDE = ("software", "version", "kind", "device", "layer", "command")
COMMANDS = {"generate": "text", "edit": "edit", "layers": "layers", "controlnet": "controlnet"}


def write_png(path: str | os.PathLike, image: Image.Image, parameters: Mapping[str, Any]) -> None:
    """Write `image` with `parameters`; the file appears when it is complete, or not at all."""
    atomic_write(path, png_writer(image, parameters))


def png_writer(image: Image.Image, parameters: Mapping[str, Any]) -> Writer:
    info = PngImagePlugin.PngInfo()
    stored = {"software": SOFTWARE, **parameters}
    text = json.dumps(stored, ensure_ascii=False, sort_keys=True)
    if not_text(text):  # a file's name, which may be any bytes: escaped in JSON's way
        text = json.dumps(stored, sort_keys=True)
    info.add_itxt(KEYWORD, text)
    return lambda file: image.save(file, format="PNG", pnginfo=info)


def read_parameters(path: str | os.PathLike) -> dict[str, Any]:
    """The parameters that `write_png` kept in a PNG.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not a PNG, is damaged, or has no parameters of this package.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.text.get(KEYWORD)  # type: ignore[attr-defined]  # reads to the end: text may follow the pixels
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a PNG picture") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if text is None:
        raise ValueError(f"{path} holds no parameters; only pictures by {SOFTWARE} that were not re-encoded do")
    try:
        parameters = json.loads(text)
    except ValueError:
        parameters = None
    if not isinstance(parameters, dict) or parameters.get("software") != SOFTWARE:
        raise ValueError(f"{path} holds the parameters of other software, not of {SOFTWARE}")
    return parameters


def read_request(path: str | os.PathLike) -> tuple[Request, dict[str, Any], list[str]]:
    """What a PNG was made with, the fields that it has of that, and names in it that this version does not know.

    Raises:
        as `read_parameters`, and ValueError where a value is wrong.
    """
    found = read_parameters(path)
    kind = found.get("kind") or COMMANDS.get(str(found.get("command", "generate")), "")
    if kind not in KINDS:
        raise ValueError(f"{path} was made by a later version: it is of the kind {kind or found['command']}")
    values = {name: value for name, value in found.items() if name not in BESIDE and value is not None}
    if "kind" not in found:
        values = _of_older_version(kind, values)
    fields = KINDS[kind].model_fields
    stored = {name: value for name, value in values.items() if name in fields}
    try:
        return make(kind, {}, stored), stored, sorted(values.keys() - fields.keys())
    except RequestError as error:
        raise ValueError(f"{path}: {error}") from error


def _of_older_version(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Which wrote the result's sides where they were not asked for, and what had no effect."""
    left_out = {"max_sequence_length"} if kind == "edit" else set()
    if kind != "text":
        left_out |= {"width", "height"}
        if "size" in values:
            values["width"], values["height"] = parse_size(values.pop("size"), (0, 0))
            left_out -= {"width", "height"}
    if kind == "edit" and "mask" not in values:
        left_out.add("strength")
    return {name: value for name, value in values.items() if name not in left_out}
