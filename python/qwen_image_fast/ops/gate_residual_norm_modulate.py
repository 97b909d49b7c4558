"""The seam between two sub-layers of a block: gated residual, LayerNorm and modulation in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES, pointer
from qwen_image_fast.ops.fp8_rows import check_fp8, empty_fp8_rows, fp8_rows

_OP = "gate_residual_norm_modulate"


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    offsets: Tensor | None = None,
    eps: float = 1e-6,
    *,
    fp8: bool = False,
) -> Any:
    """residual = x + gate * y; out = LayerNorm(residual) * (1 + scale) + shift.

    Args:
        x, y: [..., width], contiguous: the stream and the sub-layer's output.
        gate, shift, scale: [segments, width], dtype of x; rows may be strided or expanded.
        offsets: int32 [segments + 1], first row of each segment; None: segments of equal length.
        eps: added to the variance.
        fp8: return (residual, out, values, scales), with `fp8_rows(out)` from the same pass; without gradients only.

    Returns:
        (residual, out), both [..., width]. Arithmetic in float32 (float64 for float64); each result is rounded once,
        and the statistics are those of the rounded residual. In float16 the residual saturates at +-65504.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    if fp8:
        check_fp8(_OP, x, y, gate, shift, scale)
    if lib.use_reference():
        residual, out = gate_residual_norm_modulate_reference(x, y, gate, shift, scale, offsets, eps)
        return (residual, out, *fp8_rows(out)) if fp8 else (residual, out)
    if fp8:
        call = _forward_fp8 if lib.call_directly(x, y, gate, shift, scale) else _fp8_op
        return call(x, y, gate, shift, scale, offsets, eps)
    if lib.call_directly(x, y, gate, shift, scale):
        return _forward(x, y, gate, shift, scale, offsets, eps)
    return _op(x, y, gate, shift, scale, offsets, eps)


def gate_residual_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    offsets: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, in the dtype of x."""
    rows, segments = x.numel() // max(x.shape[-1], 1), gate.shape[0]
    gate, shift, scale = (lib.segment_rows(offsets, segments, rows, t).view(x.shape) for t in (gate, shift, scale))
    residual = x + gate * y
    if x.dtype == torch.float16:
        residual = residual.clip(-65504, 65504)
    return residual, F.layer_norm(residual, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _check(x, y, gate, shift, scale, offsets) -> None:
    lib.check_input(_OP, "x", x)
    lib.check_same(_OP, "y", y, x, "x")
    lib.check_vectors(_OP, x, offsets, gate=gate, shift=shift, scale=scale)


def _forward(x, y, gate, shift, scale, offsets, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, y, gate, shift, scale, offsets)
    residual, out = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        width = x.shape[-1]
        lib.launch(
            "gate_residual_norm_modulate_forward", x,
            x.data_ptr(), y.data_ptr(), gate.data_ptr(), shift.data_ptr(), scale.data_ptr(), gate.stride(0),
            shift.stride(0), scale.stride(0), pointer(offsets), residual.data_ptr(), out.data_ptr(),
            x.numel() // width, width, gate.shape[0], eps, DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return residual, out


def _forward_fp8(x, y, gate, shift, scale, offsets, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not lib.on_cuda(x):
        residual, out = _forward(x, y, gate, shift, scale, offsets, eps)
        return residual, out, *fp8_rows(out)
    residual, out, values, scales = _fake_fp8(x, y, gate, shift, scale, offsets, eps)
    if x.numel():
        width = x.shape[-1]
        lib.launch(
            "gate_residual_norm_modulate_fp8_forward", x,
            x.data_ptr(), y.data_ptr(), gate.data_ptr(), shift.data_ptr(), scale.data_ptr(), gate.stride(0),
            shift.stride(0), scale.stride(0), pointer(offsets), residual.data_ptr(), out.data_ptr(),
            x.numel() // width, width, gate.shape[0], eps, DTYPE_CODES[x.dtype], values.data_ptr(), scales.data_ptr(),
        )  # fmt: skip
    return residual, out, values, scales


def _fake_fp8(x, y, gate, shift, scale, offsets, eps):
    return *_fake(x, y, gate, shift, scale, offsets, eps), *empty_fp8_rows(x)


def _fake(x, y, gate, shift, scale, offsets, eps):
    _check(x, y, gate, shift, scale, offsets)
    return torch.empty_like(x), torch.empty_like(x)


def _backward(grad_residual, grad_out, residual, y, gate, scale, offsets, eps: float):
    grad_residual, grad_out = grad_residual.contiguous(), grad_out.contiguous()
    grads = _backward_fake(grad_residual, grad_out, residual, y, gate, scale, offsets, eps)
    width = y.shape[-1]
    rows, segments = y.numel() // max(width, 1), gate.shape[0]
    lib.launch(
        "gate_residual_norm_modulate_backward", y,
        residual.data_ptr(), y.data_ptr(), gate.data_ptr(), scale.data_ptr(), gate.stride(0), scale.stride(0),
        pointer(offsets), grad_residual.data_ptr(), grad_out.data_ptr(), *(g.data_ptr() for g in grads),
        rows, width, segments, eps, DTYPE_CODES[y.dtype], scratch=(rows, width, segments, offsets is None),
    )  # fmt: skip
    return grads


def _backward_fake(grad_residual, grad_out, residual, y, gate, scale, offsets, eps):
    vectors = (gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape))
    return torch.empty_like(y), torch.empty_like(y), *vectors


_op = lib.register(
    _OP,
    "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, Tensor? offsets, float eps) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
_fp8_op = lib.register(
    f"{_OP}_fp8",
    "(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, Tensor? offsets, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fp8,
    _fake_fp8,
)
_backward_op = lib.register(
    f"{_OP}_backward",
    "(Tensor grad_residual, Tensor grad_out, Tensor residual, Tensor y, Tensor gate, Tensor scale, Tensor? offsets,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    _, y, gate, _, scale, offsets, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale, offsets)


def _autograd(ctx, grad_residual, grad_out):
    residual, y, gate, scale, offsets = ctx.saved_tensors
    grads = _backward_op(grad_residual, grad_out, residual, y, gate, scale, offsets, ctx.eps)
    return *grads, None, None


lib.register_autograd(_OP, _autograd, _setup_context)
