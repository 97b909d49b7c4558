"""Samples and editing pairs as a pure function of (recipe, seed, index), one at a time or by many processes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from qwen_image_fast.training.worker_pool import worker_pool

from . import complex as complex_layouts
from . import compositional, pure, scenes, shapes
from .fonts import FontDecides
from .recipe import STRATEGIES, SynthesisRecipe
from .sample import Description, Sample

Made = TypeVar("Made")

_MAKERS = {
    "shapes": shapes.make,
    "pure": pure.make,
    "compositional": compositional.make,
    "complex": complex_layouts.make,
    "scenes": scenes.make,
}
MOST_ATTEMPTS = 200
_CHUNK = 32


class Undrawable(ValueError):
    """Draw after draw of a sample was dropped."""


def make(recipe: SynthesisRecipe, seed: int, index: int) -> Sample:
    """Sample `index` of a recipe. The same arguments and font files give the same bytes, on any number of processes.

    A draw that cannot be rendered whole (a glyph is missing, a text does not fit at a legible size) is dropped and
    drawn anew.

    Raises:
        fonts.FontError: a language has no font.
        FileNotFoundError: compositional samples have no photographs.
        photos.UnreadablePhoto: the photograph that was drawn is damaged.
        Undrawable: 200 draws in a row were dropped.
    """
    return retried(recipe, seed, index, _make_once)


def describe(recipe: SynthesisRecipe, seed: int, index: int) -> Description:
    """What `make` tells of the same sample, without its picture: of pure texts that fit in any font, without a font.

    Raises:
        as `make`; `fonts.FontError` only where what is told depends on the font.
    """
    with contextlib.suppress(FontDecides):
        return retried(recipe, seed, index, _describe_once)
    made = make(recipe, seed, index)
    return Description(made.caption, made.lines, made.language, made.colours)


def retried(
    recipe: SynthesisRecipe,
    seed: int,
    index: int,
    draw: Callable[[SynthesisRecipe, random.Random, str, tuple[int, int], str], Made | None],
) -> Made:
    """`draw(recipe, rng, strategy, size, language)` until it is not None.

    Strategy, size and language stay the same over the attempts, so that drops do not change the recipe's shares.
    """
    rng = generator_of(seed, index)
    strategy = rng.choices(STRATEGIES, [getattr(recipe, name) for name in STRATEGIES])[0]
    size, language = rng.choice(recipe.sizes), rng.choice(recipe.languages)
    for _ in range(MOST_ATTEMPTS):
        made = draw(recipe, rng, strategy, size, language)
        if made is not None:
            return made
    why = (
        "no colour of text_colours stood out, or a solid was hidden; use more text_colours and ground_colours"
        if strategy == "scenes"
        else "a glyph was missing or the text did not fit at a legible size; use a larger size, fewer letters or "
        "lines, shorter paragraphs, or fonts with more glyphs"
    )
    raise Undrawable(
        f"recipe: {MOST_ATTEMPTS} {strategy} samples in {language} at {size[0]} x {size[1]} were dropped, because {why}"
    )


def generator_of(seed: int, index: int) -> random.Random:
    """Random numbers that depend on nothing else. Hashed, so that neighbouring seeds and indices are unrelated."""
    digest = hashlib.blake2b(f"qwen-image-fast synthesis {seed} {index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def stream(
    recipe: SynthesisRecipe,
    seed: int,
    start: int = 0,
    count: int | None = None,
    workers: int = 0,
    make: Callable[[SynthesisRecipe, int, int], Any] = make,
) -> Iterator[Any]:
    """Samples `start`, `start + 1`, … in order.

    Args:
        recipe, seed: see `make`.
        start: first index; a resumed run continues with the index it stopped at.
        count: how many; None: without end.
        workers: processes; 0: this one. They are spawned, so a script needs the `if __name__ == "__main__":` guard.
        make: a function at the top level of a module, such as `make` or `editing.make_edit`.
    """
    if start < 0 or (count is not None and count < 0) or workers < 0:
        raise ValueError(f"stream: start, count and workers must be 0 or more, got {start}, {count}, {workers}")
    return _stream(recipe, seed, start, count, workers, make)


def _stream(
    recipe: SynthesisRecipe,
    seed: int,
    start: int,
    count: int | None,
    workers: int,
    make: Callable[[SynthesisRecipe, int, int], Any],
) -> Iterator[Any]:
    if workers == 0:
        for index in itertools.count(start) if count is None else range(start, start + count):
            yield make(recipe, seed, index)
        return
    end = None if count is None else start + count
    begins = itertools.count(start, _CHUNK) if end is None else range(start, end, _CHUNK)
    pool = worker_pool(workers)
    try:
        waiting: deque[Future[list[Any]]] = deque()
        for begin in begins:
            stop = begin + _CHUNK if end is None else min(begin + _CHUNK, end)
            waiting.append(pool.submit(_make_many, make, recipe, seed, begin, stop))
            if len(waiting) > 2 * workers:  # bounds the memory where the consumer is slower
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_many(
    make: Callable[[SynthesisRecipe, int, int], Any], recipe: SynthesisRecipe, seed: int, begin: int, stop: int
) -> list[Any]:
    return [make(recipe, seed, index) for index in range(begin, stop)]


def _make_once(
    recipe: SynthesisRecipe, rng: random.Random, strategy: str, size: tuple[int, int], language: str
) -> Sample | None:
    return _MAKERS[strategy](recipe, rng, size, language)


def _describe_once(
    recipe: SynthesisRecipe, rng: random.Random, strategy: str, size: tuple[int, int], language: str
) -> Description | None:
    if strategy != "pure":
        raise FontDecides
    return pure.describe(recipe, rng, size, language)
