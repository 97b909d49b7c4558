"""Weights in 4 bits (csrc/kernels/int4_tile.h): codes of a codebook and a scale for every 16 of them, as `linear_int8`
reads them, and as ComfyUI's files hold them (`asym_w4a8_int8`).

weight[c][d] = round(LEVELS[code] / 128 * times[c][d / 16]), an integer of 8 bits. Levels are odd and times never 64, so
that no product lies halfway between two integers: every way to round it is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_image_fast.ops import _int8
from qwen_image_fast.ops._library import _C

GROUP, CODES, TILE, SHIFT = 16, 512, 576, 7  # csrc/kernels/int4_tile.h
LEVELS = (-127, -105, -79, -61, -45, -31, -19, -5, 5, 19, 31, 45, 61, 79, 105, 127)


def empty_packed(columns: int, depth: int) -> tuple[Tensor, Tensor]:
    """The places of a packed weight, uint8 [columns / 16, depth / 64, 576], and the sums of its integers' rows, int32
    [columns]."""
    tiles = _int8.up(columns, _int8.COLUMNS), _int8.up(depth, _int8.DEPTH), TILE
    return torch.empty(tiles, dtype=torch.uint8, device="cpu"), torch.empty(columns, dtype=torch.int32, device="cpu")


def quantise(rotated: Tensor, packed: Tensor, scales: Tensor, sums: Tensor) -> None:
    """Of [columns, depth] on the CPU, the depth a multiple of 16, into `empty_packed` and float32 [columns]."""
    rotated = rotated.float().contiguous()
    if rotated.numel():
        _C.int4_quantise(*(t.data_ptr() for t in (rotated, packed, scales, sums)), *rotated.shape)


def in_8_bits(packed: Tensor) -> Tensor:
    """The integers of tiles in 4 bits: int8 [columns / 16, depth / 64, 16, 16, 4]."""
    panels, steps, _ = packed.shape
    if packed.is_cpu:
        out = torch.empty(panels, steps, _int8.DEPTH // 4, _int8.COLUMNS, 4, dtype=torch.int8)
        if out.numel():
            _C.int4_unpack(packed.data_ptr(), out.data_ptr(), panels * steps)
        return out
    return in_8_bits_reference(packed)


def in_8_bits_reference(packed: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    codes, times = parts(packed)
    levels = torch.tensor(LEVELS, dtype=torch.int16, device=packed.device)[codes.long()]
    return ((levels * times + (1 << SHIFT - 1)) >> SHIFT).to(torch.int8)


def parts(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [panels, steps, 16, 16, 4], and times, int16 [panels, steps, 16, 16, 1], for each."""
    panels, steps, _ = packed.shape
    halves = packed[..., :CODES].view(panels, steps, 16, 32)
    codes = torch.cat([halves & 15, halves >> 4], -1).view(panels, steps, 16, 16, 4)
    times = packed[..., CODES:].view(panels, steps, 4, 1, 16, 1).expand(-1, -1, -1, 4, -1, -1)
    return codes, times.reshape(panels, steps, 16, 16, 1).to(torch.int16)


def to_rows(packed: Tensor, columns: int, depth: int) -> tuple[Tensor, Tensor]:
    """As files have them: codes in pairs, the even one in the low half, uint8 [columns, depth / 2]; times, uint8
    [columns, depth / 16]."""
    codes, times = parts(packed)
    codes = _int8.unpack(codes, columns, depth)
    times = _int8.unpack(times.to(torch.uint8).expand_as(_shape(packed)), columns, depth)
    return codes[:, ::2] | codes[:, 1::2] << 4, times[:, ::GROUP].contiguous()


def from_rows(codes: Tensor, times: Tensor) -> Tensor:
    """The other way."""
    columns, depth = len(codes), codes.shape[1] * 2
    panels, steps = _int8.up(columns, _int8.COLUMNS), _int8.up(depth, _int8.DEPTH)
    wide = codes.new_zeros(panels * _int8.COLUMNS, steps * _int8.DEPTH)
    wide[:columns, :depth:2], wide[:columns, 1:depth:2] = codes & 15, codes >> 4
    many = codes.new_zeros(panels * _int8.COLUMNS, steps * _int8.DEPTH // GROUP)
    many[:columns, : depth // GROUP] = times
    tiles = wide.view(panels, _int8.COLUMNS, steps, 16, 4).permute(0, 2, 3, 1, 4).reshape(panels, steps, 16, 64)
    halves = tiles[..., :32] | tiles[..., 32:] << 4
    of_groups = many.view(panels, _int8.COLUMNS, steps, 4).permute(0, 2, 3, 1)
    return torch.cat([halves.flatten(2), of_groups.flatten(2)], -1).contiguous()


def _shape(packed: Tensor) -> Tensor:
    return packed.new_empty(1).expand(*packed.shape[:2], 16, 16, 4)
