"""The projections of both streams to query, key and value, in one launch on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops import _linear

_OP = "linear_qkv"
MOST = 6


def linear_qkv(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor]) -> list[Tensor]:
    """out_i = x_i weight_i^T + bias_i for up to six products, which share depth and number of columns.

    A stream's tokens appear once for each of its projections; the weights stay where they are. The kernels that
    compute it are chosen by `linear_kernels`.

    Args:
        x: 1 to 6 tensors [rows_i, depth], contiguous; one dtype of float32, float16, bfloat16, float64.
        weight: as many, [columns, depth]. bias: as many, [columns].

    Returns:
        As many tensors [rows_i, columns]. Sums are in float32 (float64 for float64), rounded once.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; tensors that chosen kernels cannot
        take.
    """
    if lib.use_reference():
        return linear_qkv_reference(x, weight, bias)
    return _linear.call(_OP, _forward, _op, x, weight, bias)


def linear_qkv_reference(x, weight, bias) -> list[Tensor]:
    """The formula in plain PyTorch, in the dtype of x."""
    return [F.linear(a, w, b) for a, w, b in zip(x, weight, bias)]


def _forward(x, weight, bias, kernel: str) -> list[Tensor]:
    _linear.check(_OP, x, weight, bias, MOST)
    if kernel == "torch":
        return _linear.products(x, weight, bias)
    out = _linear.empty_outputs(x, weight)
    _linear.launch(_OP, kernel, x, weight, bias, out)
    return out


_op = _linear.register(_OP, MOST, _forward)


def _setup_context(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.count = len(x)
    ctx.save_for_backward(*x, *weight)


def _autograd(ctx, grads):
    n, saved = ctx.count, ctx.saved_tensors
    return (*_linear.backward(ctx.needs_input_grad[:3], grads, saved[:n], saved[n:]), None)


lib.register_autograd(_OP, _autograd, _setup_context)
