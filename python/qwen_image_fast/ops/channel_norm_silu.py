"""The VAE's RMS norm over channels with the SiLU behind it (Qwen-Image VAE, arXiv 2508.02324; the norm of Wan 2.1), and
the sums in front of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES, pointer

_OP, _ADD = "channel_norm_silu", "add_channel_norm_silu"


def channel_norm_silu(
    x: Tensor, gamma: Tensor, bias: Tensor | None = None, silu: bool = True, inplace: bool = False
) -> Tensor:
    """out = SiLU(u), u = x / max(|x|_2, 1e-12) * sqrt(C) * gamma + bias, |x|_2 over the last dimension.

    Args:
        x: [..., C], contiguous: channels last; float32, float16, bfloat16 or float64.
        gamma: [C], dtype of x, contiguous. bias: likewise, or None for none.
        silu: False gives u itself.
        inplace: the result may overwrite x; it does where no gradient and no tracing asks for x.

    Returns:
        The shape of x. Arithmetic in float32 (float64 for float64), one rounding on store.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    if lib.use_reference():
        return channel_norm_silu_reference(x, gamma, bias, silu)
    if lib.call_directly(x, gamma, bias):
        return _forward(x, gamma, bias, silu, x if inplace else None)
    return _op(x, gamma, bias, silu)


def add_channel_norm_silu(
    x: Tensor, added: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None, inplace: bool = False
) -> Tensor:
    """out = f(x + added + residual): f is `channel_norm_silu` with gamma, or nothing. What a convolution leaves to do.

    On CUDA, where no gradient and no tracing asks for anything, one pass in which the sum is rounded once; elsewhere
    sums of torch and `channel_norm_silu`.

    Args:
        x, gamma: as of `channel_norm_silu`. added: [C], like gamma. residual: like x. None for none.
        inplace: the result may overwrite x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, _ADD, added=added, gamma=gamma)
    if residual is not None:
        lib.check_like(_ADD, "residual", residual, x)
        if residual.shape != x.shape or not residual.is_contiguous():
            lib.fail(_ADD, "residual", f"be contiguous and have the shape {tuple(x.shape)}", tuple(residual.shape))
    if lib.use_reference() or not (lib.on_cuda(x) and lib.call_directly(x, added, residual, gamma)):
        total = x + added if residual is None else x + added + residual
        return total if gamma is None else channel_norm_silu(total, gamma)
    out = x if inplace else torch.empty_like(x)
    if x.numel():
        channels = x.shape[-1]
        lib.launch(
            f"{_ADD}_forward", x, x.data_ptr(), added.data_ptr(), pointer(residual), pointer(gamma), out.data_ptr(),
            x.numel() // channels, channels, DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return out


def channel_norm_silu_reference(x: Tensor, gamma: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """The formula in plain PyTorch, in the dtype of x; 16 bit: the norm in float32, as diffusers has it."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    u = F.normalize(wide, dim=-1).to(x.dtype) * x.shape[-1] ** 0.5 * gamma
    u = u if bias is None else u + bias
    return F.silu(u) if silu else u


def _check(x: Tensor, op: str = _OP, **vectors: Tensor | None) -> None:
    lib.check_input(op, "x", x)
    for name, t in vectors.items():
        if t is None:
            continue
        lib.check_like(op, name, t, x)
        if t.shape != x.shape[-1:]:
            lib.fail(op, name, f"have one value per channel of x, {x.shape[-1]}", tuple(t.shape))
        if not t.is_contiguous():
            lib.fail(op, name, "be contiguous", f"strides {t.stride()}")


def _forward(x: Tensor, gamma: Tensor, bias: Tensor | None, silu: bool, out: Tensor | None = None) -> Tensor:
    _check(x, gamma=gamma, bias=bias)
    if out is None:
        out = torch.empty_like(x)
    if x.numel():
        channels = x.shape[-1]
        lib.launch(
            f"{_OP}_forward", x, x.data_ptr(), gamma.data_ptr(), pointer(bias), out.data_ptr(), x.numel() // channels,
            channels, silu, DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return out


def _fake(x, gamma, bias, silu):
    _check(x, gamma=gamma, bias=bias)
    return torch.empty_like(x)


def _backward(
    grad_out: Tensor, x: Tensor, gamma: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out = grad_out.contiguous()
    grad_x, grad_gamma, grad_bias = _backward_fake(grad_out, x, gamma, bias, silu)
    channels = x.shape[-1]
    rows = x.numel() // max(channels, 1)
    lib.launch(
        f"{_OP}_backward", x, x.data_ptr(), gamma.data_ptr(), pointer(bias), grad_out.data_ptr(), grad_x.data_ptr(),
        grad_gamma.data_ptr(), pointer(grad_bias) if bias is not None else 0, rows, channels, silu,
        DTYPE_CODES[x.dtype], scratch=(rows, channels),
    )  # fmt: skip
    return grad_x, grad_gamma, grad_bias


def _backward_fake(grad_out, x, gamma, bias, silu):
    # An op returns tensors only: without a bias its gradient is empty.
    return torch.empty_like(x), torch.empty_like(gamma), gamma.new_empty(0 if bias is None else gamma.shape[0])


_op = lib.register(_OP, "(Tensor x, Tensor gamma, Tensor? bias, bool silu) -> Tensor", _forward, _fake)
_backward_op = lib.register(
    f"{_OP}_backward",
    "(Tensor grad_out, Tensor x, Tensor gamma, Tensor? bias, bool silu) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, gamma, bias, ctx.silu = inputs
    ctx.save_for_backward(x, gamma, bias)


def _autograd(ctx, grad_out):
    x, gamma, bias = ctx.saved_tensors
    grad_x, grad_gamma, grad_bias = _backward_op(grad_out, x, gamma, bias, ctx.silu)
    return grad_x, grad_gamma, None if bias is None else grad_bias, None


lib.register_autograd(_OP, _autograd, _setup_context)
