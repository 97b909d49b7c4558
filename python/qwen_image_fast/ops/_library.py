"""What every op shares: registration with torch, the choice between the direct call and the registered op, checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from qwen_image_fast import _C

NAMESPACE = "qwen_image_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}

_reference = False


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Run every op's plain PyTorch reference instead of the compiled kernels. The switch is process-wide."""
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before


def use_reference() -> bool:
    return _reference


def register(name: str, schema: str, impl: Callable, fake: Callable) -> Any:
    """Define `qwen_image_fast::name`; autograd is added by the op's own file with `torch.library.register_autograd`."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.qwen_image_fast, name).default


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


_plain_types = (Tensor, torch.nn.Parameter)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def call_directly(*tensors: Tensor | None) -> bool:
    """Whether the kernel may be called without the dispatcher: eager, no gradient needed, no mode or subclass watching.

    The two ways give the same bits; the direct one skips the dispatcher and autograd.
    """
    if torch.compiler.is_compiling() or _dispatch_modes():
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (type(t) in _plain_types and not (grad and t.requires_grad)) for t in tensors)


# Checks run at every call: conditions first, words only for an error.


def fail(op: str, argument: str, rule: str, value: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument} must {rule}, got {value}")


def check_input(op: str, name: str, x: Tensor) -> None:
    """The first input: a dtype with kernels, at least one dimension, contiguous, on a device with kernels.

    `meta` and fake tensors pass, they are never computed.
    """
    if x.dtype not in DTYPE_CODES:
        fail(op, "dtype", "be float32, float16, bfloat16 or float64", x.dtype, TypeError)
    if x.dim() < 1:
        fail(op, name, "have at least one dimension", tuple(x.shape))
    if not x.is_contiguous():
        fail(op, name, "be contiguous", f"strides {x.stride()}")
    check_device(op, x)


def check_device(op: str, x: Tensor) -> None:
    if not (x.is_cpu or x.is_meta):
        raise NotImplementedError(
            f"{op}: this build has kernels for cpu, got a tensor on {x.device}; "
            "run it under `with qwen_image_fast.reference():` or move it to the CPU"
        )


def check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """`t` has the dtype and the device of `x`."""
    if t.dtype != x.dtype:
        fail(op, name, f"have the dtype of the first input, {x.dtype}", t.dtype, TypeError)
    if t.get_device() != x.get_device() or t.is_cpu != x.is_cpu:
        fail(op, name, f"be on the device of the first input, {x.device}", t.device)


def check_same(op: str, name: str, t: Tensor, x: Tensor, first: str) -> None:
    """`t` has dtype, device and shape of `x`, whose name is `first`, and is contiguous."""
    check_like(op, name, t, x)
    if t.shape != x.shape:
        fail(op, name, f"have the shape of {first}, {tuple(x.shape)}", tuple(t.shape))
    if not t.is_contiguous():
        fail(op, name, "be contiguous", f"strides {t.stride()}")


def check_vectors(op: str, x: Tensor, offsets: Tensor | None, **vectors: Tensor) -> None:
    """Per-segment vectors [segments, width] with a contiguous last dimension, and the offsets of their segments."""
    segments, width = None, x.shape[-1]
    for name, t in vectors.items():
        check_like(op, name, t, x)
        if t.dim() != 2:
            fail(op, name, "have two dimensions, [segments, width]", tuple(t.shape))
        rows, columns = t.shape
        if columns != width:
            fail(op, name, f"have the width of x, {width}", tuple(t.shape))
        if segments is None:
            segments = rows
        if rows != segments:
            fail(op, name, f"have {segments} segments like the others", rows)
        if t.stride(1) != 1 and width > 1:
            fail(op, name, "be contiguous in its last dimension", t.stride())
    check_offsets(op, x, offsets, segments or 0)


def check_offsets(op: str, x: Tensor, offsets: Tensor | None, segments: int) -> None:
    rows = x.numel() // max(x.shape[-1], 1)
    if offsets is None:
        if segments != 1:
            if segments == 0 and rows:
                fail(op, "segments", "be at least one", segments)
            if rows % max(segments, 1):
                fail(op, "rows", f"be a multiple of the {segments} segments", rows)
        return
    if offsets.dtype != torch.int32:
        fail(op, "offsets", "be int32", offsets.dtype)
    if offsets.get_device() != x.get_device() or offsets.is_cpu != x.is_cpu:
        fail(op, "offsets", f"be on the device of x, {x.device}", offsets.device)
    if offsets.dim() != 1 or offsets.shape[0] != segments + 1:
        fail(op, "offsets", f"have segments + 1 = {segments + 1} entries", tuple(offsets.shape))
    if not offsets.is_contiguous():
        fail(op, "offsets", "be contiguous", offsets.stride())
    check_cumulative(op, "offsets", offsets, rows)


def check_cumulative(op: str, name: str, offsets: Tensor, rows: int) -> None:
    """Offsets rise from 0 to the number of rows. Read only where that is free: on the CPU, outside of tracing."""
    if type(offsets) is not Tensor or not offsets.is_cpu or torch.compiler.is_compiling():
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows or any(a > b for a, b in zip(values, values[1:])):
        raise ValueError(f"{op}: {name} must rise from 0 to the number of rows, {rows}, got {values}")


def segment_rows(offsets: Tensor | None, segments: int, rows: int, vector: Tensor) -> Tensor:
    """[segments, width] -> [rows, width]: each row gets the vector of its segment. For references."""
    if offsets is None:
        return vector.repeat_interleave(rows // max(segments, 1), dim=0)
    return vector.repeat_interleave(offsets.diff(), dim=0, output_size=rows)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


__all__ = ["DTYPE_CODES", "_C", "call_directly", "pointer", "reference", "register", "register_autograd"]
