"""The layouts of 8-bit matrices that `int8_rows` writes and `linear_int8` reads, and the rotation of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import _C

ROWS, DEPTH, COLUMNS = 16, 64, 16  # of a tile; csrc/kernels/int8_rows.h and linear_int8.h
GROUPS = (1, 4, 16, 64, 256)
SMALLEST = 1e-30  # of a row's largest magnitude, below which it is zero
MOST_WIDTH = 24576  # on CUDA, where a row lies in shared memory


def up(n: int, step: int) -> int:
    """n / step, rounded up."""
    return -(-n // step)


def empty_tiles(rows: int, width: int, like: Tensor) -> Tensor:
    return torch.empty(up(rows, ROWS), up(width, DEPTH), ROWS, DEPTH, dtype=torch.uint8, device=like.device)


def to_tiles(values: Tensor) -> Tensor:
    """int8 [rows, width] -> uint8 [rows / 16, width / 64, 16, 64] of values + 128; filled up with 128."""
    rows, width = values.shape
    out = values.new_full((up(rows, ROWS) * ROWS, up(width, DEPTH) * DEPTH), 128, dtype=torch.uint8)
    out[:rows, :width] = (values.to(torch.int16) + 128).to(torch.uint8)
    return out.view(-1, ROWS, out.shape[1] // DEPTH, DEPTH).transpose(1, 2).contiguous()


def from_tiles(tiles: Tensor, rows: int, width: int) -> Tensor:
    """The other way."""
    flat = tiles.transpose(1, 2).reshape(tiles.shape[0] * ROWS, -1)[:rows, :width]
    return (flat ^ 128).view(torch.int8).contiguous() if flat.numel() else flat.to(torch.int8)


def rotated(x: Tensor, group: int) -> Tensor:
    """Every `group` values of the last dimension times the regular Hadamard matrix, stage by stage as in the kernel."""
    stride = 1
    while stride < group:
        quads = x.reshape(*x.shape[:-1], -1, 4, stride)
        a, b, c, d = quads.unbind(-2)
        x = ((0.5 * ((a + b) + (c + d))).unsqueeze(-2) - quads.flip(-2)).reshape(x.shape)
        stride *= 4
    return x


def check_group(op: str, group: int, width: int) -> None:
    if group not in GROUPS or width % group:
        lib.fail(op, "group", f"be one of {', '.join(map(str, GROUPS))} that divides the width {width}", group)


def group_of(width: int) -> int:
    """The largest group that divides a width."""
    return next(group for group in reversed(GROUPS) if width % group == 0)


def empty_packed(columns: int, depth: int) -> tuple[Tensor, Tensor]:
    """The places of a packed weight, int8 [columns / 16, depth / 64, 16, 16, 4], and the sums of its rows, int32
    [columns]."""
    tiles = up(columns, COLUMNS), up(depth, DEPTH), DEPTH // 4, COLUMNS, 4
    return torch.empty(tiles, dtype=torch.int8, device="cpu"), torch.empty(columns, dtype=torch.int32, device="cpu")


def pack(weight: Tensor, places: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """int8 [columns, depth] as `linear_int8` reads it, in `places`, or in those of `empty_packed`; where it is."""
    columns, depth = weight.shape
    if not weight.is_cpu:
        return pack_by_torch(weight)
    weight = weight.contiguous()
    packed, sums = empty_packed(columns, depth) if places is None else places
    if weight.numel():
        _C.int8_pack(weight.data_ptr(), packed.data_ptr(), sums.data_ptr(), columns, depth)
    return packed, sums


def pack_by_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch's operators."""
    columns, depth = weight.shape
    whole = weight.new_zeros(up(columns, COLUMNS) * COLUMNS, up(depth, DEPTH) * DEPTH)
    whole[:columns, :depth] = weight
    tiles = whole.view(-1, COLUMNS, up(depth, DEPTH), DEPTH // 4, 4).permute(0, 2, 3, 1, 4)
    return tiles.contiguous(), weight.sum(1, dtype=torch.int32)


def unpack(packed: Tensor, columns: int, depth: int) -> Tensor:
    """int8 [columns, depth] of a packed weight."""
    flat = packed.permute(0, 3, 1, 2, 4).reshape(packed.shape[0] * COLUMNS, -1)
    return flat[:columns, :depth].contiguous()
