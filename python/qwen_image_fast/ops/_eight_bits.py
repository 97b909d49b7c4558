"""Which 8-bit numbers the tensor cores of a GPU multiply faster, integers or float8, by its compute capability.

Of rotated numbers, which are nearly normal, a row of integers is closer to them than one of e4m3, so where both have
one rate, integers are taken. The figures are the makers' peaks, not measurements.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


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


def describe(capability: tuple[int, int]) -> str:
    """For people: what is preferred, and what that means here, where the products are those of integers."""
    name, rates = "sm_{}{}".format(*capability), RATES.get(capability)
    if rates is None:
        return f"int8; no figures of {name}"
    share = f"int8 at {rates.int8 / rates.bfloat16:.2g} times the peak of bfloat16 on {name}"
    if preferred(capability) == "int8":
        return share
    return f"{share}, which prefers float8, and has no such products here: 8 bits save memory alone"
