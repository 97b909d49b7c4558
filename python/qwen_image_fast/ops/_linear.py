"""What linear_qkv, linear_gelu and linear_gate_residual share: checks, the choice of kernels, and the launch.

Their products run in torch (cuBLASLt on CUDA), or all together in one launch of the kernels in csrc/cutlass_kernels.
`linear_table.json` beside this file says where the latter were measured to be faster; it is empty until they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._choices import chosen_linear_kernels
from qwen_image_fast.ops._library import _C, DTYPE_CODES, pointer

TABLE = Path(__file__).with_name("linear_table.json")
TILES = {"cutlass large": 0, "cutlass small": 1}
AMX: bool = _C.build_info()["amx"]
# {"sm_90": {"linear_gelu 3072 -> 12288": {"1024": "cutlass large"}}}
_faster: dict[str, dict[str, dict[str, str]]] = json.loads(TABLE.read_text(encoding="utf-8"))["faster"]


def fused(op: str, x: Sequence[Tensor], weight: Sequence[Tensor]) -> bool:
    """Whether these products would run in one launch now; a model keeps to its modules where they would not."""
    if not x or not x[0].is_cuda or lib.use_reference():
        return False
    return kernel_for(op, x, weight) != "torch"


def groups_streams(x: Tensor) -> bool:
    """Whether products of both streams may be one launch on the device of `x` now."""
    choice = chosen_linear_kernels()
    return choice.startswith("cutlass") or (
        choice == "table" and bool(_faster) and architecture(x.get_device()) in _faster
    )


def kernel_for(op: str, x: Sequence[Tensor], weight: Sequence[Tensor]) -> str:
    """ "torch", "cutlass large", "cutlass small", or for linear_gelu "cublaslt"."""
    choice = chosen_linear_kernels()
    if choice == "torch" or not x[0].is_cuda:
        return "torch"
    columns, depth = weight[0].shape
    rows = [t.shape[0] for t in x]
    if choice != "table":
        return by_size(rows, columns) if choice == "cutlass" else choice
    kernel = measured(op, x[0].get_device(), depth, columns, max(rows))
    if kernel != "torch" and obstacle(x, weight) is not None:
        kernel = "torch"
    if kernel == "torch" and op == "linear_gelu" and _without_gradients(x, weight):
        return "cublaslt"
    return kernel


def _without_gradients(x: Sequence[Tensor], weight: Sequence[Tensor]) -> bool:
    """In 16 bits, whose rounding between product and activation is saved, and nothing recorded."""
    if x[0].dtype not in (torch.float16, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (*x, *weight)))


def by_size(rows: Sequence[int], columns: int) -> str:
    """Large tiles where they fill a GPU of 132 processors twice."""
    tiles = sum(-(-r // 128) for r in rows) * -(-columns // 256)
    return "cutlass large" if tiles >= 2 * 132 else "cutlass small"


@cache
def architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def describe_linear(device: str) -> str:
    """What computes the linear layers of the transformer there, in words for the doctor."""
    if device != "cuda":
        return "torch's products" + ("; large ones in float32 on AMX (linear_amx)" if AMX else "")
    if not lib._has_cuda:
        return "cuBLASLt through torch, GELU in its epilogue; this build has no CUTLASS kernels"
    name = architecture(torch.cuda.current_device())
    if _faster.get(name):
        return f"cuBLASLt through torch, or CUTLASS where measured faster on {name}"
    return f'cuBLASLt through torch; nothing measured on {name}: ops.linear_kernels("cutlass") asks for CUTLASS'


def measured(op: str, device: int, depth: int, columns: int, rows: int) -> str:
    """The table's kernel: that of the largest measured number of rows not above `rows`; torch below the first."""
    if not _faster:
        return "torch"
    entries = _faster.get(architecture(device), {}).get(f"{op} {depth} -> {columns}", {})
    known = [int(r) for r in entries if int(r) <= rows]
    return entries[str(max(known))] if known else "torch"


def obstacle(x: Sequence[Tensor], weight: Sequence[Tensor]) -> tuple[str, str, object] | None:
    """What keeps the kernels from these tensors: an argument, a rule and a value."""
    if x[0].dtype not in (torch.float16, torch.bfloat16):
        return "dtype", "be float16 or bfloat16 for the CUTLASS kernels", x[0].dtype
    for name, size in zip(("columns", "depth"), weight[0].shape):
        if size % 8 or not 0 < size < 2**31:
            return name, "be a multiple of 8 below 2^31 for the CUTLASS kernels", size
    for t in (*x, *weight):
        if type(t) in lib._plain_types and t.data_ptr() % 16:
            return "data", "be aligned to 16 bytes for the CUTLASS kernels", hex(t.data_ptr())
    return None


def check(op: str, x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor], most: int) -> None:
    """One to `most` products of one dtype, device, depth and number of columns."""
    if not 1 <= len(x) <= most:
        lib.fail(op, "x", f"hold 1 to {most} tensors", len(x))
    for name, tensors in (("weight", weight), ("bias", bias)):
        if len(tensors) != len(x):
            lib.fail(op, name, f"hold {len(x)} tensors like x", len(tensors))
    lib.check_dtype(op, x[0])
    if weight[0].dim() != 2:
        lib.fail(op, "weight", "have two dimensions, [columns, depth]", tuple(weight[0].shape))
    columns, depth = weight[0].shape
    for a, w, b in zip(x, weight, bias):
        for name, t in (("x", a), ("weight", w), ("bias", b)):
            lib.check_like(op, name, t, x[0])
            if not t.is_contiguous():
                lib.fail(op, name, "be contiguous", f"strides {t.stride()}")
        if a.dim() != 2 or a.shape[1] != depth:
            lib.fail(op, "x", f"have the shape [rows, {depth}]", tuple(a.shape))
        if tuple(w.shape) != (columns, depth):
            lib.fail(op, "weight", f"have one shape, {(columns, depth)}", tuple(w.shape))
        if tuple(b.shape) != (columns,):
            lib.fail(op, "bias", f"have the shape {(columns,)}", tuple(b.shape))
        lib.check_device(op, a)


def products(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Sequence[Tensor]) -> list[Tensor]:
    return [F.linear(a, w, b) for a, w, b in zip(x, weight, bias)]


def empty_outputs(x: Sequence[Tensor], weight: Sequence[Tensor]) -> list[Tensor]:
    return [a.new_empty(a.shape[0], w.shape[0]) for a, w in zip(x, weight)]


def register(op: str, most: int, forward: Callable) -> Callable:
    """Register `op(x, weight, bias, kernel)`, of at most `most` products, which `forward` computes."""

    def fake(x, weight, bias, kernel):
        check(op, x, weight, bias, most)
        return empty_outputs(x, weight)

    return lib.register(op, "(Tensor[] x, Tensor[] weight, Tensor[] bias, str kernel) -> Tensor[]", forward, fake)


def call(op: str, forward: Callable, registered: Callable, x, weight, bias) -> list[Tensor]:
    """`forward` with the kernels that are chosen now, directly or by the registered op."""
    kernel = kernel_for(op, x, weight) if x and weight else "torch"
    if lib.call_directly(*x, *weight, *bias):
        return forward(x, weight, bias, kernel)
    return registered(list(x), list(weight), list(bias), kernel)


def launch(op: str, kernel: str, x, weight, bias, out, residual=(), gate=(), offsets=()) -> None:
    """All products in one launch, with the epilogue of `op`; the caller has checked."""
    found = obstacle((*x, *residual), weight)
    if found is None:
        for t in (*bias, *gate):
            if t.data_ptr() % 16 or (t.dim() == 2 and t.stride(0) % 8):
                found = "bias and gate", "be aligned to 16 bytes for the CUTLASS kernels", hex(t.data_ptr())
    if found is not None:
        lib.fail(op, *found, TypeError if found[0] == "dtype" else ValueError)
    columns, depth = weight[0].shape
    linears = []
    for i, (a, w, b, o) in enumerate(zip(x, weight, bias, out)):
        epilogue: tuple = (0, 0, 0, 0, 1)
        if residual:
            epilogue = (residual[i].data_ptr(), gate[i].data_ptr(), gate[i].stride(0), pointer(offsets[i]),
                        gate[i].shape[0])  # fmt: skip
        linears.append((a.data_ptr(), w.data_ptr(), b.data_ptr(), o.data_ptr(), a.shape[0], *epilogue))
    lib.launch(f"{op}_forward", x[0], linears, columns, depth, TILES[kernel], DTYPE_CODES[x[0].dtype])


def backward(needs: Sequence[Sequence[bool]], grads: Sequence[Tensor], x, weight) -> tuple[list, list, list]:
    """Gradients of x, weight and bias from those of the products, by library GEMMs; None where not asked for."""
    needs_x, needs_weight, needs_bias = needs
    return (
        [g @ w if n else None for n, g, w in zip(needs_x, grads, weight)],
        [g.t() @ a if n else None for n, g, a in zip(needs_weight, grads, x)],
        [g.sum(0) if n else None for n, g in zip(needs_bias, grads)],
    )


__all__ = ["_C", "describe_linear"]
