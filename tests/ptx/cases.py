"""Calls of the interpreted kernels, with what they should compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ptx.device import InterpretedDevice
from qwen_image_fast.ops import Int8Weight, _int8, _linear
from qwen_image_fast.ops._library import DTYPE_CODES, pointer
from qwen_image_fast.ops.linear_int8 import linear_int8_reference

LINEAR = ("linear_qkv", "linear_gelu", "linear_gate_residual")
KERNELS = {"sm_80": (8, "cutlass large"), "sm_90a large": (9, "cutlass large"), "sm_90a small": (9, "cutlass small")}
SEEDS = range(1, 21)  # of the orders in which a clean kernel must be clean


def assert_rounded_once(out: Tensor, exact: Tensor) -> None:
    """Sums in float32 and one rounding, of every element."""
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} of {out.numel()} elements are not finite"
    error, allowed = (out.double() - exact).abs(), torch.finfo(out.dtype).eps * (exact.abs() + 1e-2)
    assert (error <= allowed).all(), f"{(error > allowed).sum()} of {out.numel()} elements are wrong"


def int8_product(rows: int, depth: int, columns: int, dtype: torch.dtype, four: bool = False) -> tuple:
    """Rows, weight and bias of a layer in 8 bits, or with weights in 4."""
    draw = torch.Generator().manual_seed(rows + depth + columns)
    values = torch.randint(-127, 128, (rows, depth), generator=draw, dtype=torch.int8)
    if four:
        weight = Int8Weight.of_floats(torch.randn(columns, depth, generator=draw), 1)
    else:
        numbers = torch.randint(-128, 128, (columns, depth), generator=draw, dtype=torch.int8)
        weight = Int8Weight.of(numbers, torch.rand(columns, generator=draw), 1)
    # Copies: what torch.empty made counts as not written until a kernel has had it.
    copied = {name: getattr(weight, name).clone() for name in ("packed", "sums", "scales")}
    weight = weight._replace(**copied)
    bias = torch.randn(columns, generator=draw).to(dtype)
    return (_int8.to_tiles(values), torch.rand(rows, generator=draw) / 1000), weight, bias


def fp8_product(rows: int, depth: int, columns: int, dtype: torch.dtype) -> tuple:
    """Rows, weight and bias of a layer in float8, of integers whose sums are exact in float32."""
    draw = torch.Generator().manual_seed(rows + depth + columns)

    def matrix(n: int) -> Tensor:
        drawn = torch.randint(-8, 9, (n, depth), generator=draw).float()
        return _int8.filled_up(drawn).to(torch.float8_e4m3fn)

    sums = torch.zeros(columns, dtype=torch.int32)
    weight = Int8Weight(matrix(columns), sums, torch.rand(columns, generator=draw), depth, 1)
    return (
        (matrix(rows), torch.rand(rows, generator=draw) / 1000),
        weight,
        torch.randn(columns, generator=draw).to(dtype),
    )


def cancelling_product(rows: int, depth: int, columns: int, dtype: torch.dtype) -> tuple:
    """One whose bias takes nearly all of the products away, so that the last bits of these are seen."""
    (values, scales), weight, _ = int8_product(rows, depth, columns, dtype)
    made = _int8.from_tiles(values, rows, depth)[:1].expand(rows, depth).contiguous(), scales[:1].repeat(rows)
    near = _int8.to_tiles(made[0]), made[1] * (1 + torch.arange(rows) * 2.0**-18)
    return near, weight, -linear_int8_reference([near], [weight], [None], dtype)[0][0]


def products(
    device: InterpretedDevice,
    op: str,
    kernels: str,
    rows: Sequence[int],
    depth: int,
    columns: int,
    samples: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
    processors: int = 4,
) -> None:
    """One launch of `op` with a problem for each of `rows`, whose samples begin anywhere."""
    major, kernel = KERNELS[kernels]
    device.module.be(seed=seed, major=major, processors=processors)
    draw = torch.Generator().manual_seed(sum(rows) + depth + columns)
    normal = lambda *shape: torch.randn(shape, generator=draw).to(dtype)  # noqa: E731
    x = [normal(n, depth) for n in rows]
    weight = [(normal(columns, depth) * depth**-0.5).to(dtype) for _ in rows]
    bias = [normal(columns) for _ in rows]
    out = [torch.empty(n, columns, dtype=dtype) for n in rows]
    residual, gate, offsets = [], [], []
    if op == "linear_gate_residual":
        residual, gate = [normal(n, columns) for n in rows], [normal(samples, columns) for _ in rows]
        for n in rows:
            starts = torch.randint(0, n + 1, (samples - 1,), generator=draw).sort().values
            offsets.append(torch.cat([torch.tensor([0]), starts, torch.tensor([n])]).int())
    _linear.launch(op, kernel, x, weight, bias, out, residual, gate, offsets)
    for i, n in enumerate(rows):
        exact = F.linear(x[i].double(), weight[i].double(), bias[i].double())
        if op == "linear_gelu":
            exact = F.gelu(exact, approximate="tanh")
        if op == "linear_gate_residual" and n:
            exact = residual[i].double() + gate[i].double().repeat_interleave(offsets[i].diff(), 0) * exact
        if n:
            assert_rounded_once(out[i], exact)


def convolution(
    device: InterpretedDevice,
    shape: tuple[int, int, int, int],
    channels: int,
    kernel: tuple[int, int] = (3, 3),
    padding: tuple[int, int] = (1, 1),
    extras: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
) -> None:
    """conv2d's kernel on an image [batch, height, width, channels]; `extras`: with bias and residual."""
    device.module.be(seed=seed)
    torch.manual_seed(sum(shape) + channels)
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(channels, *kernel, shape[3]) * (shape[3] * kernel[0] * kernel[1]) ** -0.5).to(dtype)
    size = [n + 2 * p - k + 1 for n, p, k in zip(shape[1:3], padding, kernel)]
    out = torch.empty(shape[0], *size, channels, dtype=dtype)
    bias = torch.randn(channels).to(dtype) if extras else None
    residual = torch.randn(out.shape).to(dtype) if extras else None
    device.launch(
        "conv2d_forward", x, x.data_ptr(), weight.data_ptr(), pointer(bias), pointer(residual), out.data_ptr(),
        *shape, channels, *kernel, *padding, DTYPE_CODES[dtype],
    )  # fmt: skip
    exact = F.conv2d(
        x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), None if bias is None else bias.double(),
        padding=padding,
    ).permute(0, 2, 3, 1)  # fmt: skip
    assert_rounded_once(out, exact if residual is None else exact + residual.double())
