"""Operations of a training step, and of a GPU at best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

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
