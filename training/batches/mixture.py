"""Which source each sample comes from, and its place there: a function of (seed, sample) and of the recorded changes.

The stream of samples is cut into blocks of 1,000. In every block each part of the mixture has the same number of
places, its share by largest remainders, in an order drawn for the block. So how many samples of a part came before a
sample is known without going through them: every part counts on where it stopped, over changes of the mixture and over
stages, and no record of it comes twice, or never, within an epoch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.randomness import generator
from qwen_image_fast.training.recipe.curriculum import Change, Curriculum
from qwen_image_fast.training.recipe.data import part_key
from qwen_image_fast.training.recipe.fields import RecipeError

BLOCK = 1000
WATCHED, RECORDED = "mixture.yaml", "mixture.jsonl"


@dataclass(frozen=True)
class Segment:
    """From sample `first` on, these parts, by any key that says what they are, with these weights."""

    first: int
    weights: tuple[tuple[Any, float], ...]


class Order:
    """place(sample) -> (key of the part, position in its stream).

    Args:
        seed: of the run. segments: in order of `first`, the first at 0.
    """

    def __init__(self, seed: int, segments: Sequence[Segment]):
        self.seed, self.segments = seed, list(segments)
        self.slots = [slots([weight for _, weight in s.weights]) for s in self.segments]
        self.before: list[dict[Any, int]] = [{}]  # samples of each part before each segment
        for k, (segment, following) in enumerate(zip(self.segments, self.segments[1:])):
            counts = dict(self.before[-1])
            for place, (key, _) in enumerate(segment.weights):
                counts[key] = counts.get(key, 0) + self._count(k, place, following.first - segment.first)
            self.before.append(counts)

    def place(self, sample: int) -> tuple[Any, int]:
        k = max(i for i, segment in enumerate(self.segments) if segment.first <= sample)
        local = sample - self.segments[k].first
        block, offset = divmod(local, BLOCK)
        part = int(self._block(k, block)[offset])
        key = self.segments[k].weights[part][0]
        return key, self.before[k].get(key, 0) + self._count(k, part, local)

    def _count(self, k: int, part: int, samples: int) -> int:
        """How many of the segment's first samples are of a part."""
        blocks, rest = divmod(samples, BLOCK)
        return int(blocks * self.slots[k][part] + (self._block(k, blocks)[:rest] == part).sum())

    def _block(self, k: int, block: int) -> np.ndarray:
        return _block(self.seed, self.segments[k].first, block, self.slots[k])


def order_of(run: Curriculum, changes: Sequence[Change] = ()) -> Order:
    """Where each sample of a run comes from. Stages that take from the same source go on in it."""
    segments = []
    for step in sorted({s.first for s in run.stages} | {c.step for c in changes if c.step < run.steps}):
        weights = run.weights(step, changes)
        parts = run.stages[run.number(step)].recipe.data.parts
        keyed = tuple((part_key(part), weights[part.name]) for part in parts)
        segments.append(Segment(run.sample_of(step), keyed))
    return Order(run.stages[0].recipe.seed, segments)


@lru_cache(maxsize=64)
def _block(seed: int, first: int, block: int, slots: tuple[int, ...]) -> np.ndarray:
    draws = generator(seed, "mixture", step=first, sample=block)
    return draws.permutation(np.repeat(np.arange(len(slots)), slots))


def slots(weights: Sequence[float]) -> tuple[int, ...]:
    """Places of each part in a block, by largest remainders; a weight above 0 has one at least."""
    shares = np.asarray(weights, float) / sum(weights) * BLOCK
    found = np.floor(shares).astype(int)
    found[np.argsort(found - shares, kind="stable")[: BLOCK - found.sum()]] += 1
    for part in np.flatnonzero((shares > 0) & (found == 0)):
        found[found.argmax()] -= 1
        found[part] = 1
    return tuple(int(n) for n in found)


class Watched:
    """The changes of a run: asked for in `mixture.yaml` of its folder, kept in `mixture.jsonl`.

    `mixture.yaml` holds weights by part, such as `{words: 2, photos: 1}`; a part that it does not name keeps its
    weight. A change takes effect at a step that is written down before any sample of it is made; a resumed run reads it
    there.
    """

    def __init__(self, folder: Path):
        self.asked, self.recorded = folder / WATCHED, folder / RECORDED
        self.changes: tuple[Change, ...] = ()
        self._seen = 0.0
        if self.recorded.is_file():
            lines = [json.loads(line) for line in self.recorded.read_text(encoding="utf-8").splitlines()]
            self.changes = tuple(Change(line["step"], tuple(line["weights"].items())) for line in lines)
            self._seen = self.asked.stat().st_mtime if self.asked.is_file() else 0.0

    def look(self, step: int, now: Mapping[str, float]) -> Change | None:
        """A new change, now recorded to take effect at `step`, if one was asked for.

        Args:
            now: weights by part, as they are at that step.

        Raises:
            RecipeError: what was asked for cannot be; the mixture stays.
        """
        try:
            changed = self.asked.stat().st_mtime
        except OSError:
            return None
        if changed == self._seen:
            return None
        self._seen = changed
        change = Change(step, tuple({**now, **_read(self.asked, now)}.items()))
        lines = [json.dumps({"step": c.step, "weights": dict(c.weights)}) + "\n" for c in (*self.changes, change)]
        atomic_write(self.recorded, lambda file: file.write("".join(lines).encode()))
        self.changes = (*self.changes, change)
        return change


def _read(path: Path, now: Mapping[str, float]) -> dict[str, float]:
    import yaml  # the recipe was read with it

    rule = f"mixture: {path} must hold weights of {', '.join(now)}, at least 0, one above 0"
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{rule}; it is no YAML: {error}") from error
    numbers = isinstance(asked, dict) and all(
        name in now and isinstance(w, (int, float)) and not isinstance(w, bool) and 0 <= w < float("inf")
        for name, w in asked.items()
    )
    if not numbers or sum({**now, **asked}.values()) <= 0:
        raise RecipeError(f"{rule}, got {asked!r}")
    return {name: float(w) for name, w in asked.items()}
