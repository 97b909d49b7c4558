"""The VAE's RMS norm over channels with the SiLU behind it (Qwen-Image VAE, arXiv 2508.02324; the norm of Wan 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES, pointer

_OP = "channel_norm_silu"


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


def channel_norm_silu_reference(x: Tensor, gamma: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """The formula in plain PyTorch, in the dtype of x; 16 bit: the norm in float32, as diffusers has it."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    u = F.normalize(wide, dim=-1).to(x.dtype) * x.shape[-1] ** 0.5 * gamma
    u = u if bias is None else u + bias
    return F.silu(u) if silu else u


def _check(x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    lib.check_input(_OP, "x", x)
    for name, t in (("gamma", gamma), ("bias", bias)):
        if t is None:
            continue
        lib.check_like(_OP, name, t, x)
        if t.shape != x.shape[-1:]:
            lib.fail(_OP, name, f"have one value per channel of x, {x.shape[-1]}", tuple(t.shape))
        if not t.is_contiguous():
            lib.fail(_OP, name, "be contiguous", f"strides {t.stride()}")


def _forward(x: Tensor, gamma: Tensor, bias: Tensor | None, silu: bool, out: Tensor | None = None) -> Tensor:
    _check(x, gamma, bias)
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
    _check(x, gamma, bias)
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
