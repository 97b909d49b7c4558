"""The layouts of 8-bit matrices that `int8_rows` writes and `linear_int8` reads, and the rotation of their rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def on_gpu(x: Tensor) -> bool:
    """Whether matrices in 8 bits lie in rows there, and not in tiles."""
    return lib.on_cuda(x) or not (x.is_cpu or x.is_meta)


def shape_of_rows(rows: int, depth: int, gpu: bool) -> tuple[int, ...]:
    """Of activations, of `depth` tiles of the depth."""
    return (rows, depth * DEPTH) if gpu else (up(rows, ROWS), depth, ROWS, DEPTH)


def empty_rows(rows: int, width: int, like: Tensor) -> Tensor:
    return torch.empty(shape_of_rows(rows, up(width, DEPTH), on_gpu(like)), dtype=torch.uint8, device=like.device)


def to_tiles(values: Tensor) -> Tensor:
    """int8 [rows, width] -> uint8 [rows / 16, width / 64, 16, 64] of values + 128, filled up with 128; on a GPU [rows,
    up to a multiple of 64]."""
    rows, width = values.shape
    gpu = on_gpu(values)
    out = values.new_full((rows if gpu else up(rows, ROWS) * ROWS, up(width, DEPTH) * DEPTH), 128, dtype=torch.uint8)
    out[:rows, :width] = (values.to(torch.int16) + 128).to(torch.uint8)
    return out if gpu else out.view(-1, ROWS, out.shape[1] // DEPTH, DEPTH).transpose(1, 2).contiguous()


def from_tiles(tiles: Tensor, rows: int, width: int) -> Tensor:
    """The other way, from both."""
    flat = tiles if tiles.dim() == 2 else tiles.transpose(1, 2).reshape(tiles.shape[0] * ROWS, -1)
    flat = flat[:rows, :width]
    return (flat ^ 128).view(torch.int8).contiguous() if flat.numel() else flat.to(torch.int8)


FLOAT8, LARGEST_FLOAT8 = torch.float8_e4m3fn, 448.0


def empty_float8_rows(rows: int, width: int, like: Tensor) -> Tensor:
    """Float8 rows [rows, width, to a multiple of 64], which lie alike everywhere."""
    shape = shape_of_rows(rows, up(width, DEPTH), gpu=True)
    return torch.empty(shape, dtype=torch.uint8, device=like.device).view(FLOAT8)


def scaled(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """float32 [rows, width] -> x / scale, at most `most` in magnitude, and scale = max |x| / most, of each row."""
    largest = x.abs().amax(-1)
    zero, top = largest < SMALLEST, torch.full_like(largest, most)  # a tensor: torch divides numbers in two roundings
    return x * torch.where(zero, 0, top / largest)[:, None], torch.where(zero, 0, largest / top)


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """values * scales ~ x in float32 [rows, width]: to the nearest e4m3, ties to even, with a scale for each row whose
    largest magnitude becomes 448; the width is filled up with zeros to a multiple of 64."""
    values, scales = scaled(x, LARGEST_FLOAT8)
    return filled_up(values).to(FLOAT8), scales


def rotated(x: Tensor, group: int) -> Tensor:
    """Every `group` values of the last dimension times the regular Hadamard matrix, stage by stage as in the kernel."""
    stride = 1
    while stride < group:
        quads = x.reshape(*x.shape[:-1], x.shape[-1] // (4 * stride), 4, stride)
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
        return filled_up(weight), weight.sum(1, dtype=torch.int32)
    weight = weight.contiguous()
    packed, sums = empty_packed(columns, depth) if places is None else places
    if weight.numel():
        _C.int8_pack(weight.data_ptr(), packed.data_ptr(), sums.data_ptr(), columns, depth)
    return packed, sums


def filled_up(weight: Tensor) -> Tensor:
    """[columns, depth] as it lies on a GPU: the depth filled up with zeros."""
    return F.pad(weight, (0, -weight.shape[1] % DEPTH)).contiguous()


def in_rows(packed: Tensor, columns: int) -> Tensor:
    """int8 [columns, depth, filled up] of a packed weight."""
    return packed.permute(0, 3, 1, 2, 4).reshape(packed.shape[0] * COLUMNS, -1)[:columns].contiguous()


def unpack(packed: Tensor, columns: int, depth: int) -> Tensor:
    """int8 [columns, depth] of a packed weight."""
    return in_rows(packed, columns)[:, :depth].contiguous()
