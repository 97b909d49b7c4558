"""The first layer of the MLP with its activation, for both streams in one launch on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops import _linear
from qwen_image_fast.ops._library import DTYPE_CODES

_OP = "linear_gelu"
MOST = 2


def linear_gelu(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor]) -> list[Tensor]:
    """out_i = gelu_tanh(x_i weight_i^T + bias_i), GELU in its tanh approximation, for one or both streams.

    The kernels that compute it are chosen by `linear_kernels`: torch's product and then the kernel of `gelu_tanh`, or
    one launch with the activation on the accumulators, which are not rounded before it: of all streams by CUTLASS, or
    of each by cuBLASLt, which on CUDA is the default in 16 bits where no gradient is asked for (tier *reassociated*;
    `linear_kernels("torch")` rounds as the modules do). Nothing is kept for backward: it computes the product again.

    Args:
        x: 1 or 2 tensors [rows_i, depth], contiguous; one dtype of float32, float16, bfloat16, float64.
        weight: as many, [columns, depth]. bias: as many, [columns].

    Returns:
        As many tensors [rows_i, columns].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; tensors that chosen kernels cannot
        take.
    """
    if lib.use_reference():
        return linear_gelu_reference(x, weight, bias)
    return _linear.call(_OP, _forward, _op, x, weight, bias)


def linear_gelu_reference(x, weight, bias) -> list[Tensor]:
    """The formula in plain PyTorch, in the dtype of x."""
    return [F.gelu(F.linear(a, w, b), approximate="tanh") for a, w, b in zip(x, weight, bias)]


def _forward(x, weight, bias, kernel: str) -> list[Tensor]:
    _linear.check(_OP, x, weight, bias, MOST)
    if kernel == "cublaslt":
        return [torch._addmm_activation(b, a, w.t(), use_gelu=True) for a, w, b in zip(x, weight, bias)]
    if kernel != "torch":
        out = _linear.empty_outputs(x, weight)
        _linear.launch(_OP, kernel, x, weight, bias, out)
        return out
    out = _linear.products(x, weight, bias)
    for y in out:
        lib.launch("gelu_tanh_forward", y, y.data_ptr(), y.data_ptr(), y.numel(), DTYPE_CODES[y.dtype])
    return out


_op = _linear.register(_OP, MOST, _forward)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.count = len(x)
    ctx.save_for_backward(*x, *weight, *bias)


def _autograd(ctx, grads):
    n, saved = ctx.count, ctx.saved_tensors
    x, weight, bias = saved[:n], saved[n : 2 * n], saved[2 * n :]
    grads = [
        torch.ops.aten.gelu_backward(g, y, approximate="tanh") for g, y in zip(grads, _linear.products(x, weight, bias))
    ]
    return (*_linear.backward(ctx.needs_input_grad[:3], grads, x, weight), None)


lib.register_autograd(_OP, _autograd, _setup_context)
