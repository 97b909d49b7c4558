"""Another sample in the place of one that cannot be used: a damaged file, a caption that cannot be read.

Which one is a function of (seed, position in the source's stream) alone, as everything about a sample is: it depends
neither on who makes a batch, nor on ranks, micro-batches or what was rejected before. So nothing must be agreed upon or
remembered, a micro-batch is always full, and the positions of all other samples stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from qwen_image_fast.training.data.screen import Rejected
from qwen_image_fast.training.randomness import generator
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.sample import Sample

TRIES = 1000
# How far behind a position others are taken: of a large source mostly from the same epoch, whose order is known.
REACH = 1000


def usable(make: Callable[[int, int], Sample], seed: int, position: int) -> tuple[Sample, list[tuple[str, str]]]:
    """`make(seed, position)`, or where that is `Rejected` the first that is not of `make(seed, position + 1 + d)` for
    numbers d below 1,000 drawn from (seed, position), and (origin, reason) of those that were.

    Args:
        make: a method of a source, `sample` or `edit`.

    Raises:
        RecipeError: 1,000 tries in a row were rejected.
    """
    draws = generator(seed, "replacement", sample=position)
    rejected: list[tuple[str, str]] = []
    tried, place = 0, position
    while tried < TRIES:
        try:
            return make(seed, place), rejected
        except Rejected as error:
            rejected.append((error.origin, error.reason))
            tried += error.tries
            place = position + 1 + int(draws.integers(REACH))
    origin, reason = rejected[0]
    raise RecipeError(
        f"the data cannot be used: {tried} samples in a row were rejected, the first of them {origin} ({reason}); "
        "repair the data, choose from it with qwen-image-fast data filter, or relax data.filters"
    )
