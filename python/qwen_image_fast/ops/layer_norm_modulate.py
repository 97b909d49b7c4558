"""LayerNorm without affine parameters, then adaptive modulation (AdaLN-Zero, arXiv 2212.09748)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES, pointer
from qwen_image_fast.ops.fp8_rows import check_fp8, empty_fp8_rows, fp8_rows

_OP = "layer_norm_modulate"


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, offsets: Tensor | None = None, eps: float = 1e-6, *, fp8: bool = False
) -> Any:
    """out = LayerNorm(x) * (1 + scale) + shift, over the last dimension.

    The rows of x (all leading dimensions flattened) are grouped into segments that share one shift and scale: samples
    of a batch, or the target and reference tokens of one sample.

    Args:
        x: [..., width], contiguous; float32, float16, bfloat16 or float64.
        shift, scale: [segments, width], dtype of x; rows may be strided or expanded.
        offsets: int32 [segments + 1], first row of each segment, rising from 0 to the number of rows.
            None: segments of equal length.
        eps: added to the variance.
        fp8: return (out, values, scales), with `fp8_rows(out)` from the same pass; without gradients only.

    Returns:
        [..., width]. Statistics and arithmetic in float32 (float64 for float64), one rounding on store.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    if fp8:
        check_fp8(_OP, x, shift, scale)
    if lib.use_reference():
        out = layer_norm_modulate_reference(x, shift, scale, offsets, eps)
        return (out, *fp8_rows(out)) if fp8 else out
    if fp8:
        return (_forward_fp8 if lib.call_directly(x, shift, scale) else _fp8_op)(x, shift, scale, offsets, eps)
    if lib.call_directly(x, shift, scale):
        return _forward(x, shift, scale, offsets, eps)
    return _op(x, shift, scale, offsets, eps)


def layer_norm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, offsets: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """The formula in plain PyTorch, in the dtype of x."""
    rows, segments = x.numel() // max(x.shape[-1], 1), shift.shape[0]
    shift = lib.segment_rows(offsets, segments, rows, shift).view(x.shape)
    scale = lib.segment_rows(offsets, segments, rows, scale).view(x.shape)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _check(x: Tensor, shift: Tensor, scale: Tensor, offsets: Tensor | None) -> None:
    lib.check_input(_OP, "x", x)
    lib.check_vectors(_OP, x, offsets, shift=shift, scale=scale)


def _forward(x: Tensor, shift: Tensor, scale: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    _check(x, shift, scale, offsets)
    out = torch.empty_like(x)
    if x.numel():
        width = x.shape[-1]
        lib.launch(
            "layer_norm_modulate_forward", x,
            x.data_ptr(), shift.data_ptr(), scale.data_ptr(), shift.stride(0), scale.stride(0), pointer(offsets),
            out.data_ptr(), x.numel() // width, width, shift.shape[0], eps, DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return out


def _forward_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, offsets: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not lib.on_cuda(x):
        out = _forward(x, shift, scale, offsets, eps)
        return out, *fp8_rows(out)
    out, values, scales = _fake_fp8(x, shift, scale, offsets, eps)
    if x.numel():
        width = x.shape[-1]
        lib.launch(
            "layer_norm_modulate_fp8_forward", x,
            x.data_ptr(), shift.data_ptr(), scale.data_ptr(), shift.stride(0), scale.stride(0), pointer(offsets),
            out.data_ptr(), x.numel() // width, width, shift.shape[0], eps, DTYPE_CODES[x.dtype],
            values.data_ptr(), scales.data_ptr(),
        )  # fmt: skip
    return out, values, scales


def _fake_fp8(x, shift, scale, offsets, eps):
    return _fake(x, shift, scale, offsets, eps), *empty_fp8_rows(x)


def _fake(x, shift, scale, offsets, eps):
    _check(x, shift, scale, offsets)
    return torch.empty_like(x)


def _backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, offsets: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out = grad_out.contiguous()
    grad_x, grad_shift, grad_scale = _backward_fake(grad_out, x, scale, offsets, eps)
    width = x.shape[-1]
    rows, segments = x.numel() // max(width, 1), scale.shape[0]
    lib.launch(
        "layer_norm_modulate_backward", x,
        x.data_ptr(), scale.data_ptr(), scale.stride(0), pointer(offsets), grad_out.data_ptr(), grad_x.data_ptr(),
        grad_shift.data_ptr(), grad_scale.data_ptr(), rows, width, segments, eps, DTYPE_CODES[x.dtype],
        scratch=(rows, width, segments, offsets is None),
    )  # fmt: skip
    return grad_x, grad_shift, grad_scale


def _backward_fake(grad_out, x, scale, offsets, eps):
    return torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


_op = lib.register(_OP, "(Tensor x, Tensor shift, Tensor scale, Tensor? offsets, float eps) -> Tensor", _forward, _fake)
_fp8_op = lib.register(
    f"{_OP}_fp8",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? offsets, float eps) -> (Tensor, Tensor, Tensor)",
    _forward_fp8,
    _fake_fp8,
)
_backward_op = lib.register(
    f"{_OP}_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor? offsets, float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, _, scale, offsets, ctx.eps = inputs
    ctx.save_for_backward(x, scale, offsets)


def _autograd(ctx, grad_out):
    x, scale, offsets = ctx.saved_tensors
    grad_x, grad_shift, grad_scale = _backward_op(grad_out, x, scale, offsets, ctx.eps)
    return grad_x, grad_shift, grad_scale, None, None


lib.register_autograd(_OP, _autograd, _setup_context)
