"""Generated pictures as PNG files: free names for them, and their parameters inside.

One iTXt chunk `parameters` holds a JSON object in UTF-8:

    {"software": "qwen-image-fast", "version": ..., "model": ..., "prompt": ..., "negative_prompt": ..., "width": ...,
     "height": ..., "steps": ..., "cfg": ..., "seed": ..., "max_sequence_length": ..., "dtype": ...,
     "lightning": ..., "lora": ..., "device": ..., "command": ..., and the options of that command}

Readers that show PNG text show it as it is; only this package's own object is read back.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from qwen_image_fast.checkpoint import atomic_write

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
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEYWORD, json.dumps({"software": SOFTWARE, **parameters}, ensure_ascii=False, sort_keys=True))
    atomic_write(path, lambda file: image.save(file, format="PNG", pnginfo=info))


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


class OutputFiles:
    """Where pictures go: the file asked for, or the next free number; all is checked before any work is done.

    Args:
        output: a .png file or an existing folder. Without `overwrite` no existing file is replaced: `x.png` becomes
            `x-0001.png`. Several pictures are numbered in any case; in a folder they are `image-0001.png` and so on.
        count: how many pictures will be written.

    Raises:
        ValueError: the name is no PNG's, or its folder does not exist or is not writable.
    """

    def __init__(self, output: str | os.PathLike, overwrite: bool, count: int) -> None:
        output = Path(output)
        is_file = output.suffix.lower() == ".png" and not output.is_dir()
        self.single = output if is_file and count == 1 else None
        self.folder, self.stem = (output.parent, output.stem) if is_file else (output, "image")
        self.overwrite = overwrite
        self.number = 0
        if not self.folder.is_dir():
            raise ValueError(f"output {output} must be a .png file in an existing folder, or an existing folder")
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"output {output}: the folder {self.folder} is not writable")

    def check_space(self, needed: int) -> None:
        """OSError where fewer than `needed` bytes are free: better now than after the pictures are computed."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"{free / 1e6:.1f} MB free, up to {needed / 1e6:.1f} MB needed"
            raise OSError(errno.ENOSPC, f"no disk space for the output in {self.folder}: {sizes}")

    def write(self, image: Image.Image, parameters: Mapping[str, Any]) -> Path:
        """Write one picture under the next name, and return that."""
        path = self._next()
        write_png(path, image, parameters)
        return path

    def _next(self) -> Path:
        if self.single is not None and (self.overwrite or not self.single.exists()):
            return self.single
        while True:
            self.number += 1
            path = self.folder / f"{self.stem}-{self.number:04d}.png"
            if self.overwrite or not path.exists():
                return path
