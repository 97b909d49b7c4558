"""The last product of a sub-layer with its gate and residual, for both streams in one launch on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops import _linear

_OP = "linear_gate_residual"
MOST = 2


def linear_gate_residual(
    residual: Sequence[Tensor],
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    gate: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
) -> list[Tensor]:
    """out_i = residual_i + gate_i[segment of the row] * (x_i weight_i^T + bias_i), for one or both streams.

    The kernels that compute it are chosen by `linear_kernels`: torch's product and then one pass, or one launch with
    gate and residual on the accumulators, which are not rounded before. Backward computes the product again.

    Args:
        residual: 1 or 2 tensors [rows_i, columns], contiguous; one dtype of float32, float16, bfloat16, float64.
        x: as many, [rows_i, depth], contiguous. weight: as many, [columns, depth]. bias: as many, [columns].
        gate: as many, [segments_i, columns]; rows may be strided or expanded.
        offsets: as many, int32 [segments_i + 1], first row of each segment; None: segments of equal length.

    Returns:
        As many tensors [rows_i, columns]. In float16 they saturate at +-65504.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together; tensors that chosen kernels cannot
        take.
    """
    if lib.use_reference():
        return linear_gate_residual_reference(residual, x, weight, bias, gate, offsets)
    kernel = _linear.kernel_for(_OP, x, weight) if x and weight else "torch"
    if lib.call_directly(*residual, *x, *weight, *bias, *gate):
        return _forward(residual, x, weight, bias, gate, offsets, kernel)
    # A list of tensors that may be None has no gradient formula in torch: no offsets are an empty tensor.
    given = [x[0].new_empty(0, dtype=torch.int32) if o is None else o for o in offsets]
    return _op(list(residual), list(x), list(weight), list(bias), list(gate), given, kernel)


def linear_gate_residual_reference(residual, x, weight, bias, gate, offsets) -> list[Tensor]:
    """The formula in plain PyTorch, in the dtype of x."""
    out = []
    for r, a, w, b, g, o in zip(residual, x, weight, bias, gate, offsets):
        y = r + lib.segment_rows(o, g.shape[0], r.shape[0], g) * F.linear(a, w, b)
        out.append(y.clip(-65504, 65504) if y.dtype == torch.float16 else y)
    return out


def _given(offsets: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if o is None or o.shape[0] == 0 else o for o in offsets]


def _check(residual, x, weight, bias, gate, offsets) -> None:
    _linear.check(_OP, x, weight, bias, MOST)
    for name, tensors in (("residual", residual), ("gate", gate), ("offsets", offsets)):
        if len(tensors) != len(x):
            lib.fail(_OP, name, f"hold {len(x)} tensors like x", len(tensors))
    for r, a, w, g, o in zip(residual, x, weight, gate, offsets):
        lib.check_like(_OP, "residual", r, a)
        if tuple(r.shape) != (a.shape[0], w.shape[0]):
            lib.fail(_OP, "residual", f"have the shape {(a.shape[0], w.shape[0])}", tuple(r.shape))
        if not r.is_contiguous():
            lib.fail(_OP, "residual", "be contiguous", f"strides {r.stride()}")
        lib.check_vectors(_OP, r, o, gate=g)


def _forward(residual, x, weight, bias, gate, offsets, kernel: str) -> list[Tensor]:
    offsets = _given(offsets)
    _check(residual, x, weight, bias, gate, offsets)
    if kernel != "torch":
        out = _linear.empty_outputs(x, weight)
        _linear.launch(_OP, kernel, x, weight, bias, out, residual, gate, offsets)
        return out
    out = []
    for r, y, g, o in zip(residual, _linear.products(x, weight, bias), gate, offsets):
        out.append(torch.addcmul(r, _rows(g, o, r.shape[0]), y))
        if r.dtype == torch.float16:
            out[-1].clamp_(-65504, 65504)
    return out


def _rows(gate: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """The gate of each row; one segment needs no copies."""
    return gate if gate.shape[0] == 1 else lib.segment_rows(offsets, gate.shape[0], rows, gate)


def _fake(residual, x, weight, bias, gate, offsets, kernel):
    _check(residual, x, weight, bias, gate, _given(offsets))
    return _linear.empty_outputs(x, weight)


_op = lib.register(
    _OP,
    "(Tensor[] residual, Tensor[] x, Tensor[] weight, Tensor[] bias, Tensor[] gate, Tensor[] offsets, str kernel)"
    " -> Tensor[]",
    _forward,
    _fake,
)


def _setup_context(ctx, inputs, output):
    _, x, weight, bias, gate, offsets, _ = inputs
    ctx.count = len(x)
    ctx.save_for_backward(*x, *weight, *bias, *gate, *offsets)


def _autograd(ctx, grads):
    n = ctx.count
    x, weight, bias, gate, offsets = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(5))
    needs_residual, needs_x, needs_weight, needs_bias, needs_gate, *_ = ctx.needs_input_grad
    offsets = _given(offsets)
    grad_gates: list[Tensor | None] = [None] * n
    if any(needs_gate):
        ys = _linear.products(x, weight, bias)
        grad_gates = [_segment_sums(g * y, t.shape[0], o) for g, y, t, o in zip(grads, ys, gate, offsets)]
    grad_ys = [g * _rows(t, o, g.shape[0]) for g, t, o in zip(grads, gate, offsets)]
    grad_x, grad_weight, grad_bias = _linear.backward((needs_x, needs_weight, needs_bias), grad_ys, x, weight)
    grad_residual = [g if n else None for n, g in zip(needs_residual, grads)]
    return grad_residual, grad_x, grad_weight, grad_bias, grad_gates, [None] * n, None


def _segment_sums(values: Tensor, segments: int, offsets: Tensor | None) -> Tensor:
    """[rows, width] -> [segments, width], summed in a fixed order: a product with the rows' membership."""
    if offsets is None and segments == 1:
        return values.sum(0, keepdim=True)
    row = torch.arange(values.shape[0], device=values.device, dtype=torch.int32)
    if offsets is None:
        bounds = torch.arange(segments + 1, device=values.device, dtype=torch.int32) * (values.shape[0] // segments)
    else:
        bounds = offsets
    member = (row >= bounds[:-1, None]) & (row < bounds[1:, None])
    return member.to(values.dtype) @ values


lib.register_autograd(_OP, _autograd, _setup_context)
