"""Linear layers in float32 on CPUs with a tile unit for bfloat16 (Intel AMX), as exact as float32's own products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops import _linear
from qwen_image_fast.ops._choices import chosen_linear_kernels
from qwen_image_fast.ops._library import _C, pointer

_OP = "linear_amx"
AVAILABLE = _linear.AMX
# Rows, columns and depth from which on the unit was faster than torch on the one kind of machine measured.
SMALLEST = 384


def linear_amx(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor] | None = None) -> list[Tensor]:
    """out_i = x_i weight_i^T + bias_i for any number of products, each of its own size.

    Every float32 number is split without a remainder into three bfloat16 numbers, and six of their nine products are
    summed in float32 (csrc/kernels/linear_amx.h); the result errs less than torch's usually does. Matrices that several
    products share are split once. A result does not depend on the number of threads, and a row not on the others.

    torch computes products that are smaller than `SMALLEST` in a dimension, and all where one cannot be computed so:
    without the unit, in another dtype or on another device, and where numbers are beyond what the splitting can take
    (not finite, above 3.38e38, all of a matrix below 1e-28, or the largest of both together below 1e-24).

    Args:
        x: tensors [rows_i, depth_i]. weight: as many, [columns_i, depth_i]. One dtype and device; fastest where one of
            the two strides is 1. bias: None, or as many, [columns_i].

    Returns:
        As many tensors [rows_i, columns_i].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    if lib.use_reference():
        return linear_amx_reference(x, weight, bias)
    bias = [] if bias is None else bias
    if lib.call_directly(*x, *weight, *bias):
        return _forward(x, weight, bias)
    return _op(list(x), list(weight), list(bias))


def linear_amx_reference(x, weight, bias=None) -> list[Tensor]:
    """The formula in plain PyTorch, in the dtype of x."""
    return [F.linear(a, w, b) for a, w, b in zip(x, weight, bias or [None] * len(x))]


def worthwhile(x: Sequence[Tensor], weight: Sequence[Tensor]) -> bool:
    """Whether the unit would compute one of these products now; a model keeps to its modules where it would not."""
    if not AVAILABLE or lib.use_reference() or lib.watched() or lib.transformed():
        return False
    return any(_takes(a, w) for a, w in zip(x, weight))


def _takes(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or not x.is_cpu or chosen_linear_kernels() == "torch":
        return False
    return min(*x.shape, weight.shape[0]) >= SMALLEST


def _check(x, weight, bias) -> None:
    if not x:
        lib.fail(_OP, "x", "hold at least one tensor", 0)
    lib.check_dtype(_OP, x[0])
    for name, tensors in (("weight", weight), *([("bias", bias)] if bias else [])):
        if len(tensors) != len(x):
            lib.fail(_OP, name, f"hold {len(x)} tensors like x", len(tensors))
    for i, (a, w) in enumerate(zip(x, weight)):
        for name, t in (("x", a), ("weight", w), *([("bias", bias[i])] if bias else [])):
            lib.check_like(_OP, name, t, x[0])
        if a.dim() != 2:
            lib.fail(_OP, "x", "have two dimensions, [rows, depth]", tuple(a.shape))
        if w.dim() != 2 or w.shape[1] != a.shape[1]:
            lib.fail(_OP, "weight", f"have the shape [columns, {a.shape[1]}]", tuple(w.shape))
        if bias and tuple(bias[i].shape) != (w.shape[0],):
            lib.fail(_OP, "bias", f"have the shape {(w.shape[0],)}", tuple(bias[i].shape))


def _forward(x, weight, bias) -> list[Tensor]:
    _check(x, weight, bias)
    biases = bias or [None] * len(x)
    large = [AVAILABLE and _takes(a, w) for a, w in zip(x, weight)]
    found = _products([p for p, n in zip(zip(x, weight, biases), large) if n])
    if found is None:
        return linear_amx_reference(x, weight, bias)
    rest = iter(found)
    return [next(rest) if n else F.linear(a, w, b) for n, a, w, b in zip(large, x, weight, biases)]


def _products(products: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor] | None:
    """Each x weight^T + bias by the unit; None: numbers that it cannot take."""
    if not products:
        return []
    # What is copied here has to live until the call is over.
    products = [(_one_stride(x), _one_stride(w), None if b is None else b.contiguous()) for x, w, b in products]
    out = [x.new_empty(x.shape[0], w.shape[0]) for x, w, _ in products]
    arguments = [
        (x.data_ptr(), *x.stride(), w.data_ptr(), *w.stride(), pointer(b), y.data_ptr(), *y.shape, x.shape[1])
        for (x, w, b), y in zip(products, out)
    ]
    return out if _C.amx_products(arguments) else None


def _one_stride(t: Tensor) -> Tensor:
    return t if 1 in t.stride() else t.contiguous()


def _fake(x, weight, bias) -> list[Tensor]:
    _check(x, weight, bias)
    return [a.new_empty(a.shape[0], w.shape[0]) for a, w in zip(x, weight)]


_op = lib.register(_OP, "(Tensor[] x, Tensor[] weight, Tensor[] bias) -> Tensor[]", _forward, _fake)


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.count = len(x)
    ctx.save_for_backward(*x, *weight)


def _autograd(ctx, grads):
    """grad_x = grad weight, grad_weight = grad^T x: products of the same op, all in one call."""
    x, weight = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    pairs = [(g, w.t()) for g, w, n in zip(grads, weight, needs_x) if n]
    pairs += [(g.t(), a.t()) for g, a, n in zip(grads, x, needs_weight) if n]
    found = iter(linear_amx(*zip(*pairs)) if pairs else ())
    grad_x = [next(found) if n else None for n in needs_x]
    grad_weight = [next(found) if n else None for n in needs_weight]
    return grad_x, grad_weight, [g.sum(0) if n else None for g, n in zip(grads, needs_bias)]


lib.register_autograd(_OP, _autograd, _setup_context)
