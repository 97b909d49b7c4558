"""The block types of GGUF: how the bytes of a block become 32 or 256 values.

Layouts: ggml's ggml-common.h (https://github.com/ggml-org/llama.cpp). `d` and `m` are float16 scales and minima. The
order of the float32 operations is that of the `gguf` package, so the values are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_image_fast.weights.stored import look_up

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class BlockType(NamedTuple):
    name: str
    values: int
    size: int  # bytes
    decode: Callable[[Tensor], Tensor]  # uint8 [blocks, size] -> float32 [blocks, values]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of every block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _shifted(packed: Tensor, shifts: tuple[int, ...], mask: int, run: int) -> Tensor:
    """Small numbers that lie side by side in bytes: all `run` bytes at the first shift, then all at the next, ..."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    return packed.reshape(len(packed), -1, 1, run).bitwise_right_shift(by).bitwise_and_(mask).flatten(1)


def _nibbles(packed: Tensor, run: int) -> Tensor:
    return _shifted(packed, (0, 4), 15, run)


def _bits(packed: Tensor) -> Tensor:
    """The bits of every byte, lowest first, one after another."""
    by = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed[..., None].bitwise_right_shift(by).bitwise_and_(1).flatten(1)


def _scaled(values: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """scale * values - minimum in float32, for sub-blocks [blocks, n] of equal length."""
    blocks = values.float().view(len(values), scale.shape[1], -1).mul_(scale[..., None])
    return (blocks if minimum is None else blocks.sub_(minimum[..., None])).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:], 16).view(torch.int8).sub_(8).float().mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:], 16).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    return _nibbles(low, 16).bitwise_or_(_bits(high).bitwise_left_shift_(4))


def _q5_0(blocks: Tensor) -> Tensor:
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(torch.int8).sub_(16)
    return q.float().mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    return _five_bits(blocks[:, 4:8], blocks[:, 8:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    d, dmin = _half(blocks, 80), _half(blocks, 82)
    q = _shifted(blocks[:, 16:80], (0, 2, 4, 6), 3, 32)
    return _scaled(q, d * (scales & 15).float(), dmin * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8], 8)
    high = _shifted(packed[:, 8:], (0, 2, 4, 6), 3, 4)
    scales = (low | high << 4).view(torch.int8) - 32
    # A set bit of the mask stands for 4 more than its absence.
    above = _shifted(blocks[:, :32], tuple(range(8)), 1, 32).bitwise_xor_(1).bitwise_left_shift_(2)
    q = _shifted(blocks[:, 32:96], (0, 2, 4, 6), 3, 32).view(torch.int8) - above.view(torch.int8)
    return _scaled(q, _half(blocks, 108) * scales.float())


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    a, b, c = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat([a & 63, (c & 15) | (a >> 2 & 48)], 1)
    minima = torch.cat([b & 63, (c >> 4) | (b >> 2 & 48)], 1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_pairs(blocks[:, 4:16].contiguous())
    return _scaled(_nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_pairs(blocks[:, 4:16].contiguous())
    high = _shifted(blocks[:, 16:48], tuple(range(8)), 1, 32)
    q = _nibbles(blocks[:, 48:], 32).bitwise_or_(high.bitwise_left_shift_(4))
    return _scaled(q, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 192:208].view(torch.int8).float()
    high = _shifted(blocks[:, 128:192], (0, 2, 4, 6), 3, 32)
    q = _nibbles(blocks[:, :128], 64).bitwise_or_(high.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    return _scaled(q, _half(blocks, 208) * scales)


def _iq4_values(q: Tensor) -> Tensor:
    return look_up(torch.tensor(IQ4_VALUES, dtype=torch.float32, device=q.device), q)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _iq4_values(_nibbles(blocks[:, 2:], 16)).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    by = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device)
    high = (blocks[:, 2:4, None] >> by & 3).flatten(1)
    scales = (low | high << 4).view(torch.int8) - 32
    return _scaled(_iq4_values(_nibbles(blocks[:, 8:], 16)), _half(blocks, 0) * scales.float())


BLOCK_TYPES = {
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
}
PLAIN_TYPES = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# Types of ggml that are not read here, to be named in errors.
OTHER_TYPES = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}
