"""Estimates from sizes, before anything is loaded: the memory that a run needs, the operations of a step."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qwen_image_fast.checkpoint import pretrained_folder, read_config
from qwen_image_fast.models.precision import int8_layers, mean_bytes
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.sizes import parse_bytes
from qwen_image_fast.tiny import tiny_configs
from qwen_image_fast.training.lora import adapted_layers, make_adapter
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import FlowRecipe, LoraRecipe
from qwen_image_fast.training.recipe.names import model_folder
from qwen_image_fast.training.recipe.post import PostRecipe

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

    def under(self, limit: str) -> Needed:
        """With `limit` as a whole, of which the weights that are always there get what is left; RecipeError where
        nothing is."""
        left = parse_bytes(limit) - self.training - self.activations
        if left <= 0:
            taken = gigabytes(self.training + self.activations)
            raise RecipeError(f"recipe: model.memory must be above {taken}, which training takes, got {limit}")
        return Needed(left, self.training, self.activations)

    def __str__(self) -> str:
        weights, training, activations = map(gigabytes, (self.weights, self.training, self.activations))
        parts = f"weights {weights}, optimiser {training}, activations {activations}"
        return f"{gigabytes(self.total)} ({parts})"


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
    largest = max((height // 16) * (width // 16) for height, width in recipe.data.sizes)
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
    folder = getattr(getattr(recipe, "model", None), "start", "")
    if not folder:
        return tiny_configs()["transformer"]
    config = QwenImageTransformer2DModel.config_name
    return read_config(pretrained_folder(folder, "transformer", [config]), config)


def references_of(data: DataRecipe) -> int:
    """References of a sample: 1 where some samples are edits, as many as the sources here give."""
    return int(any(part.tasks.get("ti2i", 0) + part.tasks.get("recon", 0) > 0 for part in data.parts))


def adapter_weights(transformer: nn.Module, recipe: LoraRecipe) -> int:
    """Parameters of the adapters on a transformer on the meta device; 0 for rank 0."""
    if not recipe.rank:
        return 0
    adapters = [make_adapter(layer, name, recipe) for name, layer in adapted_layers(transformer, recipe).items()]
    return sum(tensor.numel() for adapter in adapters for tensor in adapter.tensors().values())


def check_recipe(recipe: FlowRecipe, device: torch.device, dtype: torch.dtype) -> Needed:
    """The estimate of a recipe, read from the configuration and the sizes of its model's files.

    Raises:
        RecipeError: it will not fit into the memory that is free now.
    """
    config, others = transformer_config(recipe), 0
    if recipe.model.start:
        folder = model_folder(recipe.model.start)
        files = [f for part in ("text_encoder", "vae") for f in (folder / part).glob("*.safetensors")]
        others = sum(file.stat().st_size for file in files) // 2  # released in 16 bits
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel.from_config(config)
    own = sum(p.numel() for p in transformer.parameters())
    if recipe.lora.rank:
        adapted_layers(transformer, recipe.lora)  # refuses what cannot be
        frozen, trained = own + others, adapter_weights(transformer, recipe.lora)
    else:
        learns = others if recipe.model.train_text_encoder else 0
        frozen, trained = others - learns, own + learns
    if isinstance(recipe, PostRecipe):  # the reference, the old policy
        frozen += len(recipe.policies) * trained
    tokens = tokens_of_batch(recipe, references_of(recipe.data))
    needed = estimate(recipe, transformer.config, frozen, trained, dtype, tokens)
    if recipe.model.precision:
        small = sum(layer.weight.numel() for layer in int8_layers(transformer).values())
        less = dtype.itemsize - mean_bytes(recipe.model.precision, len(transformer.transformer_blocks))
        needed = replace(needed, weights=int(needed.weights - small * less))
    if recipe.model.memory:
        check_streamed(transformer, recipe.lora)
        needed = min(needed, needed.under(recipe.model.memory), key=lambda found: found.total)
    check(needed, available(device))
    return needed


def check_streamed(transformer: nn.Module, recipe: LoraRecipe) -> None:
    """RecipeError where adapters are on layers of the modulation, which is read when it is used."""
    of_modulation = re.compile(r".*_mod\.1|norm_out\..*|time_text_embed\..*")
    if found := next(filter(of_modulation.fullmatch, adapted_layers(transformer, recipe)), None):
        raise RecipeError(
            f"recipe: lora.targets must leave out the modulation with model.memory, which reads it when it is used, "
            f"got {found}"
        )


def check(needed: Needed, there: int) -> None:
    """RecipeError where a run would not fit, with what to change."""
    if needed.total > there:
        raise RecipeError(
            f"recipe: this run needs about {needed}, {gigabytes(there)} are free: lower batch and raise accumulate, "
            "set model.gradient_checkpointing, use smaller data.buckets, or train adapters with lora.rank"
        )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
