"""The trained model in the layout of diffusers, gathered one tensor at a time: no rank ever holds all of it."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from qwen_image_fast.checkpoint import BASE_NAME, json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.tensor_files import write_in_order
from qwen_image_fast.training.parallel.layout import Parallel, full


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state of a small model, on the host of every rank."""
    return {name: full(tensor).cpu() for name, tensor in model.state_dict().items()}


def export_model(
    model: Any, folder: Path, dtype: torch.dtype, parallel: Parallel, max_shard_size: int | str = "10GB"
) -> None:
    """Write `config.json` and the weights as `dtype`; every rank calls it, rank 0 writes."""
    state = model.state_dict()
    empty = {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in state.items()}
    pattern = BASE_NAME + "{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=max_shard_size)
    if parallel.main:
        folder.mkdir(parents=True, exist_ok=True)
    for name, keys in plan.filename_to_tensors.items():
        tensors = (full(state[key]).to(dtype).cpu() for key in sorted(keys))
        shapes = {key: empty[key] for key in sorted(keys)}
        if parallel.main:
            atomic_write(folder / name, partial(write_in_order, like=shapes, tensors=tensors))
        else:
            for _ in tensors:
                pass
    if parallel.main:
        config = json_bytes({"_class_name": type(model).__name__.removeprefix("FSDP"), **model.config})
        atomic_write(folder / model.config_name, lambda file: file.write(config))
        index = folder / f"{BASE_NAME}.safetensors.index.json"
        old = re.compile(rf"{BASE_NAME}(-\d{{5}}-of-\d{{5}})?\.safetensors")
        if plan.is_sharded:
            text = json_bytes({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
            atomic_write(index, lambda file: file.write(text))
        else:
            index.unlink(missing_ok=True)
        for path in folder.iterdir():
            if old.fullmatch(path.name) and path.name not in plan.filename_to_tensors:
                path.unlink()
    parallel.barrier()
