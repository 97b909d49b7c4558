"""Estimates from sizes, before anything is loaded: the memory that a run needs, the operations of a step."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_image_fast.checkpoint import read_config
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.tiny import tiny_configs
from qwen_image_fast.training.recipe.run import DataRecipe, FlowRecipe, LoraRecipe, RecipeError

# Values that a block keeps for its backward pass, for each token and in units of the width: the inputs of both
# normalisations and their outputs, q, k and v before and after their norm and rotation, the attention's output, both
# gated branches, and the MLP's hidden layer before and after GELU.
_KEPT_BY_A_BLOCK = 22
_KEPT_BY_A_CHECKPOINT = 2


@dataclass(frozen=True)
class Needed:
    """Bytes. weights: of all models in their type; training: float32 master weights, gradients, two optimiser states
    and the average, of what learns; activations: what the backward pass reads."""

    weights: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations

    def __str__(self) -> str:
        parts = f"weights {_gb(self.weights)}, optimiser {_gb(self.training)}, activations {_gb(self.activations)}"
        return f"{_gb(self.total)} ({parts})"


def estimate(
    recipe: FlowRecipe, transformer: Any, frozen: int, trained: int, dtype: torch.dtype, tokens: int
) -> Needed:
    """What a run of a flow recipe needs.

    Args:
        transformer: its config. frozen, trained: parameters that are only read, and that learn.
        dtype: of the weights in the forward pass. tokens: of a micro-batch, image and text together.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers = transformer["num_layers"]
    size = dtype.itemsize
    kept = layers * _KEPT_BY_A_BLOCK
    if recipe.model.gradient_checkpointing:
        kept = layers * _KEPT_BY_A_CHECKPOINT + _KEPT_BY_A_BLOCK
    states = 4 * 5 if size < 4 else 4 * 4  # master, gradient, two moments, average; float32 weights are the master
    return Needed((frozen + trained) * size, trained * states, kept * width * tokens * size)


def tokens_of_batch(recipe: FlowRecipe, references: int = 0) -> int:
    """Most tokens of a micro-batch: the largest bucket for the target and each reference, the longest text."""
    largest = max((height // 16) * (width // 16) for height, width in recipe.data.buckets)
    return recipe.batch * (largest * (1 + references) + recipe.model.max_text_tokens)


def available(device: torch.device) -> int:
    """Bytes that a run can use now: free memory of the GPU, or available memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**62  # a system that does not tell: nothing is refused


def transformer_config(recipe: Any) -> Any:
    """The configuration of the transformer that a flow recipe starts from."""
    folder = getattr(getattr(recipe, "model", None), "folder", "")
    if not folder:
        return tiny_configs()["transformer"]
    return read_config(Path(folder) / "transformer", QwenImageTransformer2DModel.config_name)


def references_of(data: DataRecipe) -> int:
    """References of a sample: 1 where some samples are edits, as many as the sources here give."""
    return int(any(part.tasks.get("ti2i", 0) + part.tasks.get("recon", 0) > 0 for part in data.parts))


def adapter_weights(transformer: nn.Module, recipe: LoraRecipe) -> int:
    """Parameters of the adapters on a transformer; 0 for rank 0."""
    layers = [
        m for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(recipe.targets))
    ]
    return sum(recipe.rank * (m.in_features + m.out_features) for m in layers)


def check_recipe(recipe: FlowRecipe, device: torch.device, dtype: torch.dtype) -> Needed:
    """The estimate of a recipe, read from the configuration and the sizes of its model's files.

    Raises:
        RecipeError: it will not fit into the memory that is free now.
    """
    folder = Path(recipe.model.folder)
    config, others = transformer_config(recipe), 0
    if recipe.model.folder:
        files = [f for part in ("text_encoder", "vae") for f in (folder / part).glob("*.safetensors")]
        others = sum(file.stat().st_size for file in files) // 2  # released in 16 bits
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel.from_config(config)
    own = sum(p.numel() for p in transformer.parameters())
    if recipe.lora.rank:
        frozen, trained = own + others, adapter_weights(transformer, recipe.lora)
    else:
        learns = others if recipe.model.train_text_encoder else 0
        frozen, trained = others - learns, own + learns
    tokens = tokens_of_batch(recipe, references_of(recipe.data))
    needed = estimate(recipe, transformer.config, frozen, trained, dtype, tokens)
    check(needed, available(device))
    return needed


def check(needed: Needed, there: int) -> None:
    """RecipeError where a run would not fit, with what to change."""
    if needed.total > there:
        raise RecipeError(
            f"recipe: this run needs about {needed}, {_gb(there)} are free: lower batch and raise accumulate, set "
            "model.gradient_checkpointing, use smaller data.buckets, or train adapters with lora.rank"
        )


# Dense bfloat16 TFLOP/s with float32 sums, by a part of the device's name: NVIDIA's data sheets, AMD's for MI300X.
PEAK_TFLOPS = {
    "B200": 2250.0, "GB200": 2500.0, "H200": 989.0, "GH200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0,
    "H100": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L4": 121.0, "A40": 149.7,
    "A10": 125.0, "RTX 4090": 165.2, "RTX 3090": 71.0, "RTX 5090": 209.5, "MI300X": 1307.0,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Operations per second of a GPU in bfloat16 at best; None for one that the table does not have, and for a CPU."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    found = [key for key in PEAK_TFLOPS if re.search(rf"(?<![A-Z0-9]){key}(?![A-Z0-9])", name)]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def step_flops(transformer: Any, images: Sequence[int], texts: Sequence[int], *, adapters: bool = False) -> float:
    """Floating-point operations of forward and backward of the transformer for samples of so many tokens.

    Three times the forward pass: 2 operations for each weight of a token's own stream, and 4 L^2 width for attention in
    each layer, L the tokens of a sample; modulation and embeddings, a few per cent, are left out. Where adapters learn,
    weights have no gradients: once less for the products with weights.
    """
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    layers = transformer["num_layers"]
    matrices = 2 * 12 * width * width * layers
    by_weights = sum(i + t for i, t in zip(images, texts)) * matrices
    attention = sum(4 * (i + t) ** 2 * width * layers for i, t in zip(images, texts))
    return (2.0 if adapters else 3.0) * by_weights + 3.0 * attention


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
