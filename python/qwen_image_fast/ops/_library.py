"""What every op shares: registration with torch, the choice between the direct call and the registered op, checks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

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

    The two ways give the same bits; the direct one costs 2-3 us, the registered op 4-50 us.
    """
    if torch.compiler.is_compiling() or _dispatch_modes():
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (type(t) in _plain_types and not (grad and t.requires_grad)) for t in tensors)


def require(condition: bool, op: str, argument: str, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}, got {value}")


def check_device(op: str, x: Tensor) -> None:
    """Kernels exist for CPU tensors; `meta` and fake tensors pass, they are never computed."""
    if x.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{op}: this build has kernels for cpu, got a tensor on {x.device}; "
            "run it under `with qwen_image_fast.reference():` or move it to the CPU"
        )


def check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: dtype must be float32, float16, bfloat16 or float64, got {x.dtype}")


def check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """`t` has the dtype and the device of `x`."""
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of the first input, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of the first input, {x.device}, got {t.device}")


def check_vectors(op: str, x: Tensor, offsets: Tensor | None, **vectors: Tensor) -> None:
    """Per-segment vectors [segments, width] with a contiguous last dimension, and the offsets of their segments."""
    first = next(iter(vectors.values()))
    for name, t in vectors.items():
        check_like(op, name, t, x)
        require(t.dim() == 2, op, name, "have two dimensions, [segments, width]", tuple(t.shape))
        require(t.shape[1] == x.shape[-1], op, name, f"have the width of x, {x.shape[-1]}", tuple(t.shape))
        require(t.shape[0] == first.shape[0], op, name, f"have {first.shape[0]} segments like the others", t.shape[0])
        require(t.stride(1) == 1 or t.shape[1] <= 1, op, name, "be contiguous in its last dimension", t.stride())
    check_offsets(op, x, offsets, first.shape[0])


def check_offsets(op: str, x: Tensor, offsets: Tensor | None, segments: int) -> None:
    rows = x.numel() // max(x.shape[-1], 1)
    if offsets is None:
        require(segments > 0 or rows == 0, op, "segments", "be at least one", segments)
        require(rows % max(segments, 1) == 0, op, "rows", f"be a multiple of the {segments} segments", rows)
        return
    require(offsets.dtype == torch.int32, op, "offsets", "be int32", offsets.dtype)
    require(offsets.device == x.device, op, "offsets", f"be on the device of x, {x.device}", offsets.device)
    require(offsets.dim() == 1 and offsets.shape[0] == segments + 1, op, "offsets",
            f"have segments + 1 = {segments + 1} entries", tuple(offsets.shape))  # fmt: skip
    require(offsets.is_contiguous(), op, "offsets", "be contiguous", offsets.stride())
    check_cumulative(op, "offsets", offsets, rows)


def check_cumulative(op: str, name: str, offsets: Tensor, rows: int) -> None:
    """Offsets rise from 0 to the number of rows. Read only where that is free: on the CPU, outside of tracing."""
    if offsets.device.type != "cpu" or torch.compiler.is_compiling() or type(offsets) is not Tensor:
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
