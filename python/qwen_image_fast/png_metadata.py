"""Generated pictures as PNG files with their parameters inside.

One iTXt chunk `parameters` holds a JSON object in UTF-8:

    {"software": "qwen-image-fast", "version": ..., "model": ..., "prompt": ..., "negative_prompt": ..., "width": ...,
     "height": ..., "steps": ..., "cfg": ..., "seed": ..., "max_sequence_length": ..., "dtype": ...,
     "lightning": ..., "lora": ..., "device": ..., "command": ..., and the options of that command}

Readers that show PNG text show it as it is; only this package's own object is read back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from qwen_image_fast.files import Writer, atomic_write

KEYWORD = "parameters"
SOFTWARE = "qwen-image-fast"
# What repeats a picture, and the types that JSON gives back.
FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "prompt": (str,),
    "negative_prompt": (str, type(None)),
    "width": (int,),
    "height": (int,),
    "steps": (int,),
    "cfg": (int, float),
    "seed": (int,),
    "max_sequence_length": (int,),
    "dtype": (str,),
    "lightning": (int, type(None)),
}
# The same of what only some pictures have.
MORE_FIELDS: dict[str, tuple[type, ...]] = {
    "lora": (list, type(None)),
    "command": (str,),
    "image": (list, str),
    "control": (list,),
    "mask": (str, type(None)),
    "strength": (int, float),
    "size": (str, type(None)),
    "megapixel": (bool,),
    "count": (int,),
    "resolution": (int,),
    "exact": (bool,),
    "net": (str,),
    "scale": (int, float),
}


def write_png(path: str | os.PathLike, image: Image.Image, parameters: Mapping[str, Any]) -> None:
    """Write `image` with `parameters` (at least `FIELDS`); the file appears when it is complete, or not at all."""
    atomic_write(path, png_writer(image, parameters))


def png_writer(image: Image.Image, parameters: Mapping[str, Any]) -> Writer:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEYWORD, json.dumps({"software": SOFTWARE, **parameters}, ensure_ascii=False, sort_keys=True))
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
    for name, types in {**FIELDS, **{n: t for n, t in MORE_FIELDS.items() if n in parameters}}.items():
        value = parameters.get(name)
        texts = not isinstance(value, list) or all(isinstance(v, str) for v in value)
        if name not in parameters or type(value) not in types or not texts:
            kinds = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"{path}: the parameter {name} must be {kinds}, got {value!r}")
    return parameters
