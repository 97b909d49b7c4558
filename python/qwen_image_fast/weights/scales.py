"""Numbers times scales: how float8, int8 and int4 weights of safetensors files become floats.

The formulas are those of comfy-kitchen's `eager` backend (https://github.com/Comfy-Org/comfy-kitchen), in the order of
its roundings, and for rows and blocks float32 products rounded once.

    per tensor, float8           q[dtype] * scale[dtype]
    per row or block             (q * scale) in float32, rounded
    ConvRot                      (q * scale) H in float32, rounded; H = H4 x H4 x ..., groups along the inputs
    w4a8                         q8 = round(codebook[q4] * s_rel); (q8 * s_channel + correction) rounded, then times H
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qwen_image_fast.weights.stored import Decode, look_up

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def is_rotation(size: int) -> bool:
    """Whether there is a rotation of that many values: a power of 4, at least 4."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1


@functools.cache
def rotation(size: int) -> Tensor:
    """The regular Hadamard matrix of `size`, symmetric and its own inverse, float32."""
    h4 = h = torch.tensor(H4, dtype=torch.float32, device="cpu")
    while len(h) < size:
        h = torch.kron(h, h4)
    return h / math.sqrt(size)


def rotate(rows: Tensor, size: int) -> Tensor:
    """Every `size` values of the rows times the rotation, in the dtype of the rows."""
    h = rotation(size).to(rows)
    return (rows.view(len(rows), -1, size) @ h.T).view(rows.shape)


@functools.cache
def _float8_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


def floats(q: Tensor) -> Tensor:
    """The numbers in float32, which holds all of them; a new tensor. torch converts float8 on a CPU one by one."""
    if q.dtype in FLOAT8:
        return look_up(_float8_values(q.dtype, q.device), q.view(torch.uint8))
    return q.to(torch.float32, copy=True)


def to_float8(weight: Tensor) -> dict[str, Tensor]:
    """What a file holds of a weight in float8 e4m3 with one scale, by suffix: the largest number becomes 448.

    weight: [out, in], finite. `weight_scale` is float32 and has no dimension; `per_tensor` reads it.
    """
    largest = weight.float().abs().max()
    scale = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, torch.ones_like(largest))
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    config = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": config}


def per_tensor(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    return floats(parts["weight"]).to(dtype) * parts["scale"].view(()).to(dtype)


def cast(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    return floats(parts["weight"]).to(dtype)


def _times(q: Tensor, scale: Tensor) -> Tensor:
    """q times the scale of its block, in float32; the scale has one row for some rows, one column for some columns."""
    rows, columns = scale.shape
    blocks = floats(q).view(rows, len(q) // rows, columns, -1)
    return blocks.mul_(scale.float()[:, None, :, None]).view(q.shape)


def per_block(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    """Scale [rows of blocks, columns of blocks], of a tensor as a whole [1, 1]."""
    scale = parts["scale"]
    if "tensor_scale" in parts:  # musubi-tuner's second level
        scale = scale.float() * parts["tensor_scale"].float()
    return _times(parts["weight"], scale).to(dtype)


def rotated(size: int) -> Decode:
    def decode(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
        return rotate(_times(parts["weight"], parts["scale"]), size).to(dtype)

    return decode


def unpack_pairs(packed: Tensor) -> Tensor:
    """Two 4-bit numbers of every byte, the low one first: uint8 [rows, 2 columns]."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def rotated_pairs(size: int) -> Decode:
    """Signed 4-bit numbers with a scale for a row, rotated."""

    def decode(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
        q = unpack_pairs(parts["weight"]).view(torch.int8)
        q = torch.where(q > 7, q - 16, q)
        return rotate(_times(q, parts["scale"]), size).to(dtype)

    return decode


def grouped(width: int, bits: int, group: int, size: int) -> Decode:
    """comfy-kitchen's `asym_w4a8_int8` of 4 or 6 bits: levels of groups on an int8 grid, a scale for a row, rotated."""

    def decode(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
        packed = parts["weight"]
        codes = unpack_pairs(packed[:, : width // 2])
        if bits == 6:
            by = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=packed.device)
            high = packed[:, width // 2 :, None].view(torch.uint8) >> by & 3
            codes = codes | high.flatten(1) << 4
        levels = look_up(parts["codebook"].float(), codes) if "codebook" in parts else codes.float() - (1 << bits - 1)
        grid = _times(levels, parts["s_rel"]).round_().clamp_(-127, 127)
        values = grid.mul_(parts["s_channel"].float()[:, None])
        if "correction" in parts:
            shift = parts["correction"][:, first : first + len(values)].T.float()
            values = values.view(len(values), -1, group).add_(shift[..., None]).view(values.shape)
        return rotate(values.to(dtype), size)

    return decode
