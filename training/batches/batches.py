"""Batches of a flow-matching run: which sample, which task, which noise; all functions of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.training.batches.latents import LatentCache, Made
from qwen_image_fast.training.batches.mixture import Order, Segment, order_of
from qwen_image_fast.training.batches.replace import usable
from qwen_image_fast.training.randomness import epoch_position, generator, key, normal
from qwen_image_fast.training.recipe.curriculum import Change, Curriculum, one_stage
from qwen_image_fast.training.recipe.data import TASKS, part_key
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.sources.buckets import fit, nearest_bucket
from qwen_image_fast.training.sources.sample import Sample, Source

# What a reconstruction sample asks for.
KEEP_INSTRUCTION = "Keep the image as it is."
# Validation samples come from a stream of their own, at these noise levels (torchtitan's stratified validation).
VALIDATION_SIGMAS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class RawSample:
    """A sample before any model has seen it.

    images: the target and its references, uint8 [H, W, 3], or packed latents float [tokens, channels] from a cache.
    shapes: (frames, height, width) in tokens of each. pictures: the references as the condition encoder sees them,
    uint8 [H, W, 3]. index: its position in the stream of samples. states: of the condition encoder, [tokens, width],
    where a producer has run it. rejected: origin and reason of those in whose place it stands.
    """

    index: int
    task: str
    caption: str
    images: list[np.ndarray]
    shapes: list[ImageShape]
    pictures: list[np.ndarray]
    noise: Tensor
    sigma: float
    rejected: list[tuple[str, str]] = field(default_factory=list)
    states: Tensor | None = None


class Batch(list[RawSample]):
    """The samples of a micro-batch."""

    @property
    def rejected(self) -> list[tuple[int | None, str, str]]:
        """Index, origin and reason of the samples that others stand for."""
        return [(raw.index, *why) for raw in self for why in raw.rejected]


class Content(NamedTuple):
    """Of a sample: task, text, target and references, their shapes, the references' pixels, and what was rejected."""

    task: str
    caption: str
    images: list[np.ndarray]
    shapes: list[ImageShape]
    pictures: list[np.ndarray]
    rejected: list[tuple[str, str]]


class FlowBatches:
    """Makes micro-batches of a stage.

    A sample's index is its place in the stream of the run, (step * accumulate + micro) * batch + place in a run of one
    stage, so that a batch of 64 and two micro-batches of 32 hold the same samples. In the place of a sample that cannot
    be used stands another of its part (replace.py), with the noise, noise level and task of its index.

    Args:
        recipe: of the stage. source: instead of those that the recipe names. channels: of packed latents.
        run, number: the stages of the run and which of them this is; None: there is no other.
        sources: those of the run by `part_key`, shared by its stages.
        share: (which, of how many) equal parts of every micro-batch are made here.
    """

    def __init__(
        self,
        recipe: FlowRecipe,
        source: Source | None,
        channels: int,
        cache: LatentCache | None = None,
        *,
        run: Curriculum | None = None,
        number: int = 0,
        sources: Mapping[str, Source] | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        self.share = share
        self.recipe, self.channels, self.cache = recipe, channels, cache
        self.run, self.number = run or one_stage(recipe), number
        self.parts = {part_key(part): part for part in recipe.data.parts}
        self.sources = sources or {}
        if source is not None:
            self.sources = dict.fromkeys(self.parts, source)
        self.validation_seed = key(recipe.seed, "validation") % 2**31
        weights = tuple((k, part.weight) for k, part in self.parts.items())
        self._validation_order = Order(self.validation_seed, [Segment(0, weights)])
        self.use(())

    def use(self, changes: Sequence[Change]) -> None:
        """Follow changes of the mixture."""
        self.order = order_of(self.run, changes)

    @property
    def source(self) -> Source | None:
        """Of the first part."""
        return self.sources.get(next(iter(self.parts)))

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` of step `step` of the run; RecipeError where the data cannot be used."""
        recipe = self.recipe
        part, parts = self.share
        count = recipe.batch // parts
        first = self.run.sample_of(step) + micro * recipe.batch + part * count
        return Batch(self.sample(recipe.seed, step, index) for index in range(first, first + count))

    def validation(self) -> list[RawSample]:
        """Samples that training never sees, each once at every level; without text dropout."""
        count = self.recipe.log.validation_samples
        return [
            self.sample(self.validation_seed, 0, i, sigma=sigma) for sigma in VALIDATION_SIGMAS for i in range(count)
        ]

    def sample(self, seed: int, step: int, index: int, sigma: float | None = None) -> RawSample:
        recipe, draws = self.recipe, generator(seed, "sample", step=step, sample=index)
        dropped = float(draws.random()) < recipe.data.text_dropout
        drawn = logit_normal(draws, recipe.sigma.mean, recipe.sigma.std)
        task, caption, images, shapes, pictures, rejected = self.content(seed, index)
        frames, height, width = shapes[0]
        return RawSample(
            index, task, "" if dropped and sigma is None else caption, images, shapes, pictures,
            normal((frames * height * width, self.channels), seed, "noise", step=step, sample=index),
            drawn if sigma is None else sigma, rejected,
        )  # fmt: skip

    def content(self, seed: int, index: int) -> Content:
        """What the sample shows, the same in every step."""
        data = self.recipe.data
        if self.cache is not None:
            held_out = self.recipe.log.validation_samples
            place = len(self.cache) - 1 - index
            if seed != self.validation_seed:
                place = epoch_position(seed, index, len(self.cache) - held_out)
            cached = self.cache.read(place)
            # Which samples are edits was decided when the cache was made.
            draws = generator(seed, "task", sample=index)
            task = "ti2i" if len(cached.latents) > 1 else choose(draws, {**data.tasks, "ti2i": 0.0})
            if task != "t2i" and not cached.pixels:
                raise RecipeError(
                    "recipe: data.cache must have been made with this recipe: it lacks references' pixels"
                )
            found = Content(task, cached.text, cached.latents, cached.shapes, cached.pixels, [])
        else:
            task, sample, rejected = self.drawn(seed, index)
            images, shapes = to_buckets([sample.image, *sample.references], data.buckets)
            found = Content(task, sample.caption, images, shapes, images, rejected)
        if task == "recon":
            return found._replace(caption=KEEP_INSTRUCTION, images=found.images * 2, shapes=found.shapes * 2)
        return found._replace(pictures=found.pictures[1:])

    def drawn(self, seed: int, index: int) -> tuple[str, Sample, list[tuple[str, str]]]:
        """The task of a sample, what its source gives for it, an edit or a picture and its caption, and what that
        stands for."""
        order = self._validation_order if seed == self.validation_seed else self.order
        of, position = order.place(index)
        part = self.parts[of]
        task = choose(generator(seed, "task", sample=index), part.tasks)
        make = getattr(self.sources[of], "edit" if task == "ti2i" else "sample", None)
        if make is None:
            raise RecipeError(f"recipe: data.tasks must not have ti2i: the source {part.source} has no edits")
        # Two parts that draw their samples must not draw the same ones.
        alone = len({part_key(p) for stage in self.run.stages for p in stage.recipe.data.parts}) == 1
        return task, *usable(make, seed if alone else key(seed, of) % 2**31, position)

    def edits(self, count: int) -> tuple[list[Sample], list[tuple[str, str]]]:
        """Held-out edits of the first part to look at, and what they stand for; none where it has no edits."""
        if not hasattr(self.source, "edit"):
            return [], []
        made = [usable(self.source.edit, self.validation_seed, i) for i in range(count)]
        return [sample for sample, _ in made], [why for _, rejected in made for why in rejected]

    def to_cache(self, index: int) -> Made:
        """Sample `index` for `write_cache`; the image of a reconstruction once."""
        _, sample, rejected = self.drawn(self.recipe.seed, index)
        images, shapes = to_buckets([sample.image, *sample.references], self.recipe.data.buckets)
        return Made(sample.caption, images, shapes, rejected)


def logit_normal(rng: np.random.Generator, mean: float = 0.0, std: float = 1.0) -> float:
    """sigma = 1 / (1 + exp(-(mean + std n))), n standard normal (Qwen-Image report, arXiv 2508.02324, section 4.1)."""
    return float(1.0 / (1.0 + np.exp(-(mean + std * rng.standard_normal()))))


def choose(draws: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One of the tasks, with a probability in proportion to its weight; in whatever order they are written."""
    weights = {task: weights[task] for task in TASKS if task in weights}
    total = sum(weights.values())
    if total == 0:
        raise RecipeError("recipe: data.tasks must give t2i or recon a weight: the cache has samples that are no edits")
    return str(draws.choice(list(weights), p=[w / total for w in weights.values()]))


def to_buckets(
    images: Sequence[np.ndarray], buckets: Sequence[Sequence[int]]
) -> tuple[list[np.ndarray], list[ImageShape]]:
    """Each image cut to its bucket, and its shape in tokens of 16 x 16 pixels."""
    sizes = [nearest_bucket(*image.shape[:2], buckets) for image in images]
    return [fit(image, size) for image, size in zip(images, sizes)], [(1, h // 16, w // 16) for h, w in sizes]


class StagedBatches:
    """Makes the micro-batches of a whole run: each by its stage's maker."""

    def __init__(self, run: Curriculum, makers: Sequence[FlowBatches]):
        self.run, self.makers = run, list(makers)

    def use(self, changes: Sequence[Change]) -> None:
        for maker in self.makers:
            maker.use(changes)

    def batch(self, step: int, micro: int) -> Batch:
        return self.makers[self.run.number(step)].batch(step, micro)
