"""Which 8-bit numbers the tensor cores of a GPU multiply faster, integers or float8, by its compute capability.

Of rotated numbers, which are nearly normal, a row of integers is closer to them than one of e4m3, so where both have
one rate, integers are taken. The figures are the makers' peaks, not measurements.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import NamedTuple

import torch

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._choices import Choice

NUMBERS = ("best", "int8", "float8")
FLOAT8_FROM = (8, 9)  # the first capability with products of e4m3
_numbers: Choice[str] = Choice("eight_bits", "best")


class Rates(NamedTuple):
    """Peaks in TFLOP/s or TOP/s of dense matrices, with sums in float32 or int32; 0: no such instruction."""

    bfloat16: float
    int8: float
    float8: float


# The one table. Of each capability what NVIDIA publishes of one card, halved where it is stated for sparse matrices;
# which of two is larger decides, and nothing else.
RATES = {
    (8, 0): Rates(312, 624, 0),  # A100
    (8, 6): Rates(71, 284, 0),  # GeForce RTX 3090
    (8, 9): Rates(165, 661, 330),  # GeForce RTX 4090
    (9, 0): Rates(989, 1979, 1979),  # H100 and H200 SXM
    (10, 0): Rates(2250, 4500, 4500),  # B200
    (10, 3): Rates(2250, 150, 4500),  # B300, of which only the order matters: it keeps few units for integers
    (12, 0): Rates(210, 838, 419),  # GeForce RTX 5090
}


def preferred(capability: tuple[int, int]) -> str:
    """ "int8", or "float8" where that is faster; of a capability that is not in the table "int8"."""
    rates = RATES.get(capability)
    return "float8" if rates is not None and rates.float8 > rates.int8 else "int8"


@cache
def capability_of(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def eight_bits(choice: str) -> contextlib.AbstractContextManager[None]:
    """Choose the numbers in which layers of `precision="int8"` compute on GPUs, in this thread or asyncio task.

    It counts when weights come to a GPU, which keeps them as they are then: enter it around loading or `to`. Float8 is
    another approximation than integers, of rotated numbers a worse one (docs/quantization.md); weights in 4 bits are
    integers in any case, and on the CPU those in 8 stay integers.

    Args:
        choice: "best" is the default: what the table of peaks prefers for the GPU (`doctor` says it). "int8". "float8",
            e4m3 with a scale for each row of activations and of weights, on GPUs of compute capability 8.9 and newer;
            on others loading raises ValueError.
    """
    if choice not in NUMBERS:
        raise ValueError(f"eight_bits: choice must be one of {', '.join(NUMBERS)}, got {choice!r}")
    return _numbers.of(choice)


def numbers_on(device: torch.device) -> str:
    """ "int8" or "float8": what weights in 8 bits become on a device. Without CUDA kernels for it "int8".

    Raises:
        ValueError: float8 is asked for by name, and the GPU or the build has no such products.
    """
    if device.type != "cuda":
        return "int8"
    asked = _numbers.now()
    if not lib.has_cuda():
        if asked == "float8":
            lib.fail("eight_bits", "choice", "be best or int8 in a build without CUDA kernels", repr(asked))
        return "int8"
    capability = capability_of(torch.cuda.current_device() if device.index is None else device.index)
    if asked == "float8" and capability < FLOAT8_FROM:
        name = "sm_{}{}".format(*capability)
        rule = f"be best or int8 on {name}: products of float8 need compute capability 8.9 or newer"
        lib.fail("eight_bits", "choice", rule, repr(asked))
    return preferred(capability) if asked == "best" else asked


def describe(capability: tuple[int, int]) -> str:
    """For people: what is preferred, and by how much."""
    name, rates = "sm_{}{}".format(*capability), RATES.get(capability)
    if rates is None:
        return f"int8; no figures of {name}"
    share = f"int8 at {rates.int8 / rates.bfloat16:.2g} times the peak of bfloat16 on {name}"
    if preferred(capability) == "int8":
        return share
    return (
        f"float8 at {rates.float8 / rates.bfloat16:.2g} times the peak of bfloat16 on {name}, {share.split(' on ')[0]}"
    )
