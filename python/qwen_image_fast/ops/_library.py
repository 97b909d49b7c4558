"""What every op shares: registration with torch, the choice between the direct call and the registered op, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from qwen_image_fast import _C
from qwen_image_fast.ops._choices import use_reference

NAMESPACE = "qwen_image_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def register(name: str, schema: str, impl: Callable, fake: Callable) -> Any:
    """Define `qwen_image_fast::name`; autograd is added by the op's own file with `torch.library.register_autograd`."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.qwen_image_fast, name).default


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


_functorch, _is_functional_tensor = torch._C._functorch, torch._is_functional_tensor
_plain_types = (Tensor, torch.nn.Parameter)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def watched() -> bool:
    """Whether torch traces or a mode looks on, which should see the operators that the modules call."""
    return torch.compiler.is_compiling() or bool(_dispatch_modes())


def transformed() -> bool:
    """Whether tensors may be wrappers of torch.func or duals of forward-mode autograd, which look like any other."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def check_transforms(*tensors: Tensor | None) -> None:
    """No tensor carries a derivative that the registered ops would drop or that torch cannot lead through them."""
    for t in tensors:
        while t is not None:
            if _functorch.is_gradtrackingtensor(t) or forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError(
                    "qwen_image_fast: the ops have derivatives for `backward` alone, not for torch.func or "
                    "forward-mode autograd; run them under `with qwen_image_fast.reference():`"
                )
            t = _functorch.get_unwrapped(t) if _functorch.is_batchedtensor(t) else None


def call_directly(*tensors: Tensor | None) -> bool:
    """Whether the kernel may be called without the dispatcher: eager, no gradient needed, no mode or subclass watching,
    and every tensor has its values where its pointer points.

    The two ways give the same bits; the direct one skips the dispatcher and autograd.

    Raises:
        NotImplementedError: a derivative is asked for that the ops do not have.
    """
    if watched():
        return False
    if transformed():
        check_transforms(*tensors)
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (_has_values(t) and not (grad and t.requires_grad)) for t in tensors)


def _has_values(t: Tensor) -> bool:
    """Not a subclass, on `meta`, a wrapper of torch's functionalization, or the negative of what is stored."""
    return type(t) in _plain_types and (t.is_cpu or t.is_cuda) and not (t.is_neg() or _is_functional_tensor(t))


def has_address(t: Tensor) -> bool:
    """Whether `t` lies in memory that can be asked for: no tracing, no subclass, not on `meta`."""
    return not torch.compiler.is_compiling() and not transformed() and _has_values(t)


def aligned(t: Tensor) -> Tensor:
    """`t`, or a copy of it where kernels that read 16 bytes at once could not read it."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def launch(name: str, on: Tensor, *args: Any, scratch: tuple | None = None) -> None:
    """Run a kernel of `_C` where the tensor `on` is; on CUDA in the current stream of its device.

    Args:
        args: what the function takes (csrc/params.h).
        scratch: arguments of `<name>_scratch`, which tells how much memory the CUDA kernel needs besides.
    """
    if on.is_cpu:
        getattr(_C, name)(*args)
        return
    device = on.get_device()
    memory = None
    if scratch is not None:
        memory = torch.empty(getattr(_C, f"{name}_scratch")(*scratch), dtype=torch.uint8, device=on.device)
    kernel, stream = getattr(_C, f"{name}_cuda"), torch.cuda.current_stream(device).cuda_stream
    if device == torch.cuda.current_device():
        kernel(*args, pointer(memory), stream)
    else:
        with torch.cuda.device(device):
            kernel(*args, pointer(memory), stream)


# Checks run at every call: conditions first, words only for an error.


def fail(op: str, argument: str, rule: str, value: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {argument} must {rule}, got {value}")


def check_input(op: str, name: str, x: Tensor) -> None:
    """The first input: a dtype with kernels, at least one dimension, contiguous, on a device with kernels.

    `meta` and fake tensors pass, they are never computed.
    """
    check_dtype(op, x)
    if x.dim() < 1:
        fail(op, name, "have at least one dimension", tuple(x.shape))
    if not x.is_contiguous():
        fail(op, name, "be contiguous", f"strides {x.stride()}")
    check_device(op, x)


def check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPE_CODES:
        fail(op, "dtype", "be float32, float16, bfloat16 or float64", x.dtype, TypeError)


_has_cuda = bool(_C.build_info()["cuda_architectures"])


def has_cuda() -> bool:
    """Whether this build has CUDA kernels."""
    return _has_cuda


def on_cuda(x: Tensor) -> bool:
    """Whether CUDA kernels of this build run for the tensor."""
    return x.is_cuda and _has_cuda


def has_kernels(x: Tensor) -> bool:
    """Whether this build has kernels for the tensor: on the CPU, or on CUDA in 32 or 16 bit."""
    return x.is_cpu or (on_cuda(x) and x.dtype != torch.float64)


def check_device(op: str, x: Tensor) -> None:
    """A device with kernels, and what they take there; `meta` and fake tensors pass, they are never computed."""
    if x.is_cpu or x.is_meta:
        return
    if not (x.is_cuda and _has_cuda):
        if isinstance(x, FakeTensor):
            return
        raise NotImplementedError(
            f"{op}: this build has kernels for {'cpu and cuda' if _has_cuda else 'cpu'}, got a tensor on {x.device}; "
            "run it under `with qwen_image_fast.reference():`, move it to the CPU"
            + (", or build with QIF_CUDA=ON" if x.is_cuda else "")
        )
    if x.dtype == torch.float64:
        fail(op, "dtype", "be float32, float16 or bfloat16 on CUDA", x.dtype, TypeError)
    if x.dim() and x.numel() // max(x.shape[-1], 1) >= 2**31:
        fail(op, "rows", "be fewer than 2^31 on CUDA", x.numel() // x.shape[-1])
    if x.dim() and x.shape[-1] >= 2**31:
        fail(op, "last dimension", "be smaller than 2^31 on CUDA", x.shape[-1])
    if type(x) in _plain_types and x.data_ptr() % x.element_size():
        fail(op, "data", f"be aligned to its {x.element_size()}-byte elements", hex(x.data_ptr()))


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
    if not x.is_cpu and not x.is_meta and segments >= 2**16:  # a launch backward has them in the second dimension
        fail(op, "segments", "be fewer than 2^16 on CUDA", segments)
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
    if not _has_values(offsets) or not offsets.is_cpu or torch.compiler.is_compiling():
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


__all__ = ["DTYPE_CODES", "_C", "call_directly", "pointer", "register", "register_autograd", "use_reference"]
