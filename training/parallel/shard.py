"""A model that no rank ever holds whole: built on the meta device, split, then filled by slices of the files.

FSDP2 (`fully_shard`) keeps 1 / (dp_shard x cp) of every weight on a rank in float32, gathers one block at a time in
the compute type, and sums gradients in float32. Units: each modulation layer of a block, which runs first of all; the
rest of the block; the rest of the model. Both modulation layers as one unit would be gathered for the backward pass by
the gradient of the second one's output, which with adapters it may not have.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from qwen_image_fast.checkpoint import find_weights, read_config
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.tensor_files import Entry, read_header, read_into
from qwen_image_fast.training.lora import BASE, add_lora, is_adapter, reset_lora
from qwen_image_fast.training.parallel.layout import Parallel, local, part_of
from qwen_image_fast.training.parallel.tensor import parallelize
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.trainable import choose_trainable


def load_transformer(folder: Path, recipe: FlowRecipe, parallel: Parallel, dtype: torch.dtype) -> tuple[Any, int]:
    """The transformer of a diffusers-layout folder, split over the ranks; and the bytes that were read.

    Args:
        recipe: says what learns: all of it, or adapters. dtype: of the computation and of frozen weights; those that
            learn are float32.
    """
    config = read_config(folder, QwenImageTransformer2DModel.config_name)
    files = find_weights(folder, QwenImageTransformer2DModel.weights_name)
    with torch.device("meta"):
        transformer: Any = QwenImageTransformer2DModel.from_config(config)
    transformer.to(dtype if recipe.lora.rank else torch.float32)
    if recipe.lora.rank:
        add_lora(transformer, recipe.lora)
    choose_trainable(transformer, adapters=recipe.lora.rank > 0)
    if parallel.sizes.tp > 1:
        parallelize(transformer, parallel.mesh["tp"])
    for block in transformer.transformer_blocks:
        for unit in (block.img_mod[1], block.txt_mod[1], block):
            _shard(unit, parallel, dtype)
    shard_root(transformer, parallel, dtype)
    for method in ("modulation", "embed_text", "forward_packed"):
        register_fsdp_forward_method(transformer, method)
    transformer.to_empty(device=parallel.device)
    reset_lora(transformer, recipe.seed)
    return transformer, fill(transformer, files)


def shard_root(model: nn.Module, parallel: Parallel, dtype: torch.dtype) -> None:
    """Split what of `model` is not yet split."""
    _shard(model, parallel, dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are sums: the loss is divided by the global number of samples. gloo has no average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard(module: nn.Module, parallel: Parallel, dtype: torch.dtype) -> None:
    names = ("dp_replicate", "fsdp") if parallel.sizes.dp_replicate > 1 else "fsdp"
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(module, mesh=parallel.mesh[names], mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, so that the next forward pass sees what changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def fill(model: nn.Module, files: Iterable[Path]) -> int:
    """Read this rank's part of every parameter but those of adapters; returns the bytes read.

    Rows that are contiguous in the file are read at once, a part of the columns row by row: nothing else is touched.

    Raises:
        ValueError: the files are not the weights of this model.
    """
    entries: dict[str, Entry] = {}
    for path in files:
        entries |= read_header(path)
    wanted = {n.replace(BASE, "."): p for n, p in model.named_parameters() if not is_adapter(n)}
    wrong = sorted(wanted.keys() ^ entries.keys())
    wrong += [n for n, p in wanted.items() if n in entries and tuple(p.shape) != entries[n].shape]
    if wrong:
        raise ValueError(
            f"fill: these are not the weights of this {type(model).__name__}: {len(wrong)} tensors are missing, "
            f"unexpected or of another shape, such as {', '.join(wrong[:3])}"
        )
    total = 0
    for name, p in wanted.items():
        part = read_slice(entries[name], *part_of(p))
        total += part.nbytes
        local(p).copy_(part)
    return total


def read_slice(entry: Entry, shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """A block of a stored tensor of one or two dimensions, in its stored type."""
    out = torch.empty(shape, dtype=entry.dtype)
    if not out.numel():
        return out
    columns = entry.shape[1] if len(entry.shape) > 1 else 1
    wanted, first = (shape[1], offset[1]) if len(shape) > 1 else (1, 0)
    rows = [out] if wanted == columns else list(out)
    with open(entry.path, "rb", buffering=0) as file:
        for i, row in enumerate(rows):
            file.seek(entry.start + ((offset[0] + i) * columns + first) * entry.dtype.itemsize)
            read_into(file, row)
    return out
