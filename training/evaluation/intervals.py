"""How sure a share of right pictures is."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # of the normal distribution at 97.5 %


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score, which holds near 0 and 1 and for few pictures as well.

    Raises:
        ValueError: there is nothing to count.
    """
    if not 0 <= right <= of or not of:
        raise ValueError(f"wilson: right must be from 0 to of, and of 1 or more, got {right} of {of}")
    share, square = right / of, _Z**2 / of
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)
