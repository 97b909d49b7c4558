"""Folders of transformers that judge: what is in them, and whether it can be read, before any weight is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_image_fast.folders import nearest_file, read_json

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_HUB = "models--"


def config_of(path: Path, option: str, what: str) -> dict[str, Any]:
    """The config.json of a folder that is given as `option` and must be `what`.

    Raises:
        ValueError: there is none.
    """
    try:
        return read_json(path / "config.json")
    except FileNotFoundError as error:
        if not path.is_dir():
            raise ValueError(
                f"evaluate bench: {option} must be {what}, there is no folder {path}{nearest_file(path)}"
            ) from error
        raise ValueError(f"evaluate bench: {option} must be {what}, {path} has no config.json") from error


def check_readable(path: Path, option: str) -> None:
    """Whether weights and what prepares pictures are there.

    Raises:
        ValueError: the weights are pickles, which can run code, or something is missing.
    """
    from qwen_image_fast.checkpoint import find_weights

    try:
        find_weights(path, "model")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"evaluate bench: {option} must have its weights as safetensors: {str(error).partition(': ')[2]}"
        ) from error
    if not any((path / name).is_file() for name in _PREPROCESSORS):
        raise ValueError(
            f"evaluate bench: {option} must say how pictures are prepared, {path} has no preprocessor_config.json"
        )


def read_on_device(path: Path, what: str, model: Any, processor: Any) -> tuple[Any, Any]:
    """A model by its class of transformers, in float32 on the GPU if there is one, and what prepares its input.

    Raises:
        OSError: one of them cannot be read.
    """
    import torch

    try:
        prepares = processor.from_pretrained(path)
        read = model.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise OSError(f"evaluate bench: the {what} in {path} cannot be read: {error}") from error
    return read.float().eval().to("cuda" if torch.cuda.is_available() else "cpu"), prepares


def folder_name(path: Path) -> str:
    """The name that stands beside scores: of the folder, or of the repository that a hub's cache keeps there."""
    path = path.expanduser().resolve()
    for folder in path.parents:
        if folder.name.startswith(_HUB):
            return folder.name.removeprefix(_HUB).rpartition("--")[2]
    return path.name
