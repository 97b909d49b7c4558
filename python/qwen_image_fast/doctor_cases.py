"""Inputs of every op, for the doctor's self-test and timings."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast import ops

Value = Callable[..., Tensor]


def _offsets(rows: int) -> Tensor:
    """Three segments of different lengths."""
    return torch.tensor([0, rows // 5, rows // 2, rows], dtype=torch.int32)


def _vectors(value: Value, count: int, width: int) -> list[Tensor]:
    """Modulation vectors of three segments, strided as slices of one projection are."""
    return [t.detach().requires_grad_() for t in value(3, count, width).unbind(1)]


def _layer_norm_modulate(value: Value, rows: int, width: int) -> list:
    return [value(rows, width), *_vectors(value, 2, width), _offsets(rows)]


def _gate_residual_norm_modulate(value: Value, rows: int, width: int) -> list:
    return [value(rows, width), value(rows, width), *_vectors(value, 3, width), _offsets(rows)]


def _qk_norm_rope(value: Value, rows: int, width: int) -> list:
    """Two samples of image and text tokens."""
    head_dim = _head_dim(width)
    streams, ropes, cumulative = [], [], []
    for n in (rows, rows // 4 + 1):
        streams += [value(n, width // head_dim, head_dim) for _ in range(3)]
        angle = torch.rand(n, head_dim // 2) * 2 * math.pi
        ropes.append(torch.stack([angle.cos(), angle.sin()], -1))
        cumulative.append(torch.tensor([0, n // 3, n], dtype=torch.int32))
    return [*streams, *(value(head_dim) for _ in range(4)), *ropes, *cumulative]


def _gelu_tanh(value: Value, rows: int, width: int) -> list:
    return [value(rows, 4 * width)]  # inside the MLP


def _guided_step(value: Value, rows: int, width: int) -> list:
    tokens = [value(rows, 64) for _ in range(3)]
    return [*tokens, -torch.rand(3) * 0.1 - 0.02, 4.0, True, _offsets(rows)]


def _joint_attention(value: Value, rows: int, width: int) -> list:
    head_dim = _head_dim(width)
    lengths = [rows // 3, rows - rows // 3]
    return [*(value(rows, width // head_dim, head_dim) for _ in range(3)), lengths]


def _channel_norm_silu(value: Value, rows: int, width: int) -> list:
    return [value(rows, width // 8), value(width // 8), value(width // 8)]


def _conv3x3(value: Value, rows: int, width: int) -> list:
    """A square image with as many pixels as there are rows, as wide as the released VAE or wider, and the weights of a
    layer that keeps its variance."""
    side, channels = math.isqrt(rows), max(96, width // 8)
    weight = (value(channels, channels, 3, 3).detach() / (9 * channels) ** 0.5).requires_grad_()
    return [value(1, side, side, channels), weight, value(channels)]


def _layer(value: Value, width: int) -> list[Tensor]:
    """The weight of a layer that keeps its variance, and its bias."""
    return [(value(width, width).detach() / width**0.5).requires_grad_(), value(width)]


def _linear(value: Value, rows: int, width: int) -> list:
    return [t for n in (rows, rows // 5) for t in (value(n, width), *_layer(value, width))]


def _linear_gate_residual(value: Value, rows: int, width: int) -> list:
    args = []
    for n in (rows, rows // 5):
        args += [value(n, width), value(n, width), *_layer(value, width), *_vectors(value, 1, width), _offsets(n)]
    return args


def _conv2d(value: Value, rows: int, width: int) -> list:
    """The same, with a residual."""
    x, weight, bias = _conv3x3(value, rows, width)
    return [x, weight, bias, value(*x.shape)]


def _head_dim(width: int) -> int:
    return 128 if width % 128 == 0 else 64


# Per op: its inputs for a number of rows and a width, and whether it has CPU kernels of this package; those of the
# transformer have CUDA kernels too.
CASES: dict[str, tuple[Callable[[Value, int, int], list], bool]] = {
    "layer_norm_modulate": (_layer_norm_modulate, True),
    "gate_residual_norm_modulate": (_gate_residual_norm_modulate, True),
    "qk_norm_rope": (_qk_norm_rope, True),
    "gelu_tanh": (_gelu_tanh, True),
    "guided_step": (_guided_step, True),
    "joint_attention": (_joint_attention, False),
    "linear_amx": (_linear, False),
    "linear_qkv": (_linear, False),
    "linear_gelu": (_linear, False),
    "linear_gate_residual": (_linear_gate_residual, False),
    "channel_norm_silu": (_channel_norm_silu, True),
    "conv3x3": (_conv3x3, True),
    "conv2d": (_conv2d, False),
}
CPU_ONLY = ("conv3x3", "linear_amx")
# In float32 an op may err so many times as much as its reference. Winograd's convolution has the looser tier: its
# result errs 2.4 times as much here, the largest element of the gradient of x 8 times. In 16 bit it keeps to the rule.
ALLOWED = {"conv3x3": 10.0}


def inputs(name: str, rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> list:
    """Inputs of an op, the same in every run; those that are rounded to `dtype` require gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        args = CASES[name][0](lambda *shape: torch.randn(shape).to(dtype).requires_grad_(), rows, width)
    on_device = [a.detach().to(device).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    return args if device == "cpu" else on_device


def functions(name: str) -> tuple[Callable, Callable]:
    """The op and its reference; of those that take both streams as lists, as functions of tensors."""
    module = importlib.import_module(f"qwen_image_fast.ops.{name}")
    pair = getattr(ops, name), getattr(module, f"{name}_reference")
    return (_by_stream(pair[0]), _by_stream(pair[1])) if name.startswith("linear_") else pair


def _by_stream(op: Callable) -> Callable:
    """As a function of the image stream's inputs and then the text stream's."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        half = len(args) // 2
        return tuple(op(*([a, b] for a, b in zip(args[:half], args[half:]))))

    return run


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
