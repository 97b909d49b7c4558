"""Two results on the same prompts: won and lost, and a sign test."""

from __future__ import annotations

import math
from collections.abc import Sequence


def won_lost(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """How many became right, and how many wrong."""
    if len(before) != len(after):
        raise ValueError(f"won_lost: both must judge the same cases, got {len(before)} and {len(after)}")
    won = sum(b and not a for a, b in zip(before, after))
    return won, sum(a and not b for a, b in zip(before, after))


def sign_test(won: int, lost: int) -> float:
    """The chance of a split at least so uneven, either way, if both were as likely (exact binomial, two-sided)."""
    total, most = won + lost, max(won, lost)
    tail = sum(math.comb(total, k) for k in range(most, total + 1)) / 2**total
    return min(1.0, 2 * tail)
