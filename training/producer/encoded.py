"""Latents and condition states kept on disk under a key of everything they depend on.

A file for each, `<folder>/<first digits>/<others>.safetensors`; several runs and processes may share a folder. A key
is the hash of the picture's pixels after it was cut, or of the caption, its template, limit and pictures; of
the model that made it (its files, see `fingerprint`), its type and kind of device. So nothing is ever out of date:
another picture, caption, size or model is another key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from qwen_image_fast.files import atomic_write

_FORMAT = 1  # of the files, and of how the models are called
_WHOLE, _BLOCKS, _BLOCK = 2**22, 256, 2**14


class EncodedStore:
    """What models made before.

    Args:
        folder: made where it is missing. models: the folders of what makes latents ("latents") and states ("states").
    """

    def __init__(self, folder: Path, models: dict[str, Sequence[Path]]):
        self.folder, self.models = folder, models

    def through(
        self, kind: str, like: Tensor, items: Sequence[Sequence[Any]], make: Callable[[list[int]], Sequence[Tensor]]
    ) -> list[Tensor]:
        """What each of `items` is as `kind`: read, or made together by `make(their places)` and kept.

        Args:
            like: a weight of the model, which has its type and device. items: what each depends on beside the model,
                text, numbers and arrays.
        """
        model = "".join(fingerprint(folder) for folder in self.models[kind])
        paths = [self._path(_digest(_FORMAT, kind, model, str(like.dtype), like.device.type, *item)) for item in items]
        found = {place: value for place, path in enumerate(paths) if (value := _read(path)) is not None}
        if missing := [place for place in range(len(items)) if place not in found]:
            for place, value in zip(missing, make(missing), strict=True):
                found[place] = value
                content = save({"value": value.detach().cpu().contiguous()})
                paths[place].parent.mkdir(parents=True, exist_ok=True)
                atomic_write(paths[place], lambda file, content=content: file.write(content))
        return [found[place].to(like.device) for place in range(len(items))]

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name[2:]}.safetensors"


def _read(path: Path) -> Tensor | None:
    """None where there is none, or a damaged one, which is then made again."""
    try:
        return load(path.read_bytes())["value"]
    except Exception:  # safetensors has an error of its own for each kind of damage
        return None


def _digest(*parts: Any) -> str:
    total = hashlib.sha256()
    for part in parts:
        content = part.tobytes() if isinstance(part, np.ndarray) else str(part).encode()
        shape = part.shape if isinstance(part, np.ndarray) else ""
        total.update(f"{type(part).__name__} {shape} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()


@lru_cache(maxsize=16)
def fingerprint(folder: Path) -> str:
    """A hash of a model's files: their names, sizes and bytes; of files above 4 MiB, of 256 blocks spread over them,
    which no two trained models share."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        total.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE:
                total.update(file.read())
                continue
            for place in np.linspace(0, size - _BLOCK, _BLOCKS).astype(int).tolist():
                file.seek(place)
                total.update(file.read(_BLOCK))
    return total.hexdigest()


def models_of(pipeline: Path, vae: Path) -> dict[str, Sequence[Path]]:
    """The folders that latents and states depend on, of a pipeline's folder and a VAE's."""
    return {"latents": [vae], "states": [p for p in (pipeline / name for name in _ENCODERS) if p.is_dir()]}


_ENCODERS = ("text_encoder", "tokenizer", "processor")
