"""The condition encoder written again, with what of its folder was not loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import STORAGE_FIELD, json_bytes, save_state
from ..folders import read_json
from ..weights.formats import open_weights
from ..weights.reading import read_weights
from .text_encoder import under_stored_names

SETTINGS = (".json", ".txt", ".jinja", ".model")


def save_text_encoder(
    model: nn.Module, folder: Path, *, variant: str | None = None, max_shard_size: int | str = "10GB"
) -> None:
    """Write a `text_encoder/` folder that diffusers and transformers read, all weights in the type of the model.

    What the files had from which `load_text_encoder` read it, and it did not load (head, vision tower), is read from
    them again; other files beside them are copied.

    Args:
        model: of `load_text_encoder`; a whole `Qwen2_5_VLForConditionalGeneration` saves itself.

    Raises:
        FileNotFoundError: the files are gone.
    """
    if hasattr(model, "lm_head"):
        whole: Any = model
        whole.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        return
    files: list[Path] = getattr(model, "weight_files", [])
    if getattr(model, "streamed", None) is not None:
        where = ", ".join(map(str, files))
        raise ValueError(f"save_pretrained: weights that are streamed are not saved; they are those of {where}")
    source: Path = getattr(model, "settings_folder", folder)
    stored_weights = open_weights(files, "text_encoder").weights
    dtype = next(model.parameters()).dtype
    state = under_stored_names(model, stored_weights or ["model.language_model."]).state_dict()
    left = {name: weight for name, weight in stored_weights.items() if name not in state}
    state |= read_weights(left, dtype, torch.device("cpu"))
    config: Any = getattr(model, "config")  # noqa: B009  which nn.Module does not declare
    stored = read_json(source / "config.json") if files else json.loads(config.to_json_string())
    stored.pop(STORAGE_FIELD, None)
    save_state(
        state, folder, base_name="model", variant=variant, max_shard_size=max_shard_size,
        extra_files={"config.json": json_bytes(_typed(stored, str(dtype).removeprefix("torch.")))},
    )  # fmt: skip
    for path in source.iterdir() if source.resolve() != folder.resolve() else []:
        weights = path.name == "config.json" or ".safetensors" in path.name
        if path.is_file() and path.suffix in SETTINGS and not weights:
            shutil.copyfile(path, folder / path.name)


def _typed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with its notes of the weights' type put right."""
    known = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return {key: _typed(value, dtype) if isinstance(value, dict) else value for key, value in config.items()} | known
