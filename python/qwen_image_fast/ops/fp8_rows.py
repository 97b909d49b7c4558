"""Rows in 8-bit floating point, e4m3 with one scale to a row: what an FP8 matrix product takes as its left side."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_image_fast.ops import _library as lib

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = 2.0**-100  # of a row's magnitude: rows of zeros are not divided by zero


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """values * scales ~ x: scale = max |x| / 448 over the last dimension, values = x / scale to the nearest e4m3.

    The second output of `layer_norm_modulate` and `gate_residual_norm_modulate` with `fp8=True`, where the CUDA kernels
    write it while the row is in registers. A value is off by at most 1/16 of itself, or 2^-10 of the scale.

    Args:
        x: [..., width]; float32, float16 or bfloat16.

    Returns:
        values float8_e4m3fn [..., width]; scales float32 [...], at least 2^-100 / 448.
    """
    x = x.float()
    magnitudes = x.abs().amax(-1).clamp_min(SMALLEST) if x.shape[-1] else x.new_full(x.shape[:-1], SMALLEST)
    largest = torch.full_like(magnitudes, LARGEST)  # a tensor: torch divides by and into numbers in two roundings
    return (x * (largest / magnitudes)[..., None]).to(torch.float8_e4m3fn), magnitudes / largest


def empty_fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def check_fp8(op: str, x: Tensor, *tensors: Tensor) -> None:
    if x.dtype == torch.float64:
        lib.fail(op, "dtype", "be float32, float16 or bfloat16 with fp8=True", x.dtype, TypeError)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        lib.fail(op, "fp8", "be False where gradients are wanted: the FP8 output has none", True)
