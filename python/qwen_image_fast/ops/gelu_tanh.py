"""The MLP's activation: GELU in its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES

_OP = "gelu_tanh"


def gelu_tanh(x: Tensor, inplace: bool = False) -> Tensor:
    """out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) = x * sigmoid(2 sqrt(2 / pi) * (x + 0.044715 x^3)).

    Args:
        x: any shape, contiguous; float32, float16, bfloat16 or float64.
        inplace: the result may overwrite x; it does where no gradient and no tracing asks for x.

    Returns:
        The shape of x. Arithmetic in float32 (float64 for float64), one rounding on store.

    Raises:
        ValueError, TypeError: a dtype without kernels, or x not contiguous.
    """
    if lib.use_reference():
        return gelu_tanh_reference(x)
    if lib.call_directly(x):
        return _forward(x, x if inplace else None)
    return _op(x)


def gelu_tanh_reference(x: Tensor) -> Tensor:
    """The formula in plain PyTorch, in the dtype of x."""
    return F.gelu(x, approximate="tanh")


def _forward(x: Tensor, out: Tensor | None = None) -> Tensor:
    lib.check_input(_OP, "x", x)
    if out is None:
        out = torch.empty_like(x)
    lib.launch("gelu_tanh_forward", x, x.data_ptr(), out.data_ptr(), x.numel(), DTYPE_CODES[x.dtype])
    return out


def _fake(x):
    lib.check_input(_OP, "x", x)
    return torch.empty_like(x)


def _backward(grad_out: Tensor, x: Tensor) -> Tensor:
    grad_out, grad_x = grad_out.contiguous(), torch.empty_like(x)
    pointers = x.data_ptr(), grad_out.data_ptr(), grad_x.data_ptr()
    lib.launch("gelu_tanh_backward", x, *pointers, x.numel(), DTYPE_CODES[x.dtype])
    return grad_x


def _backward_fake(grad_out, x):
    return torch.empty_like(x)


_op = lib.register(_OP, "(Tensor x) -> Tensor", _forward, _fake)
_backward_op = lib.register(f"{_OP}_backward", "(Tensor grad_out, Tensor x) -> Tensor", _backward, _backward_fake)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad_out):
    return _backward_op(grad_out, *ctx.saved_tensors)


lib.register_autograd(_OP, _autograd, _setup_context)
