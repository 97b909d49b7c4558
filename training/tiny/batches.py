"""Batches of a flow-matching run: which sample, which task, which noise; all functions of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.training.objectives.flow import logit_normal
from qwen_image_fast.training.randomness import epoch_position, generator, key, normal
from qwen_image_fast.training.recipe import FlowRecipe, RecipeError
from qwen_image_fast.training.tiny.latents import LatentCache
from qwen_image_fast.training.tiny.sources import Sample, Source, fit, nearest_bucket

# What a reconstruction sample asks for.
KEEP_INSTRUCTION = "Keep the image as it is."
# Validation samples come from a stream of their own, at these noise levels (torchtitan's stratified validation).
VALIDATION_SIGMAS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class RawSample:
    """A sample before any model has seen it.

    images: the target and its references, uint8 [H, W, 3], or packed latents float [tokens, channels] from a cache.
    shapes: (frames, height, width) in tokens of each. pictures: the references as the condition encoder sees them,
    uint8 [H, W, 3]. index: its position in the stream of samples.
    """

    index: int
    task: str
    caption: str
    images: list[np.ndarray]
    shapes: list[ImageShape]
    pictures: list[np.ndarray]
    noise: Tensor
    sigma: float


class Content(NamedTuple):
    """Of a sample: task, text, target and references, their shapes, and the references' pixels."""

    task: str
    caption: str
    images: list[np.ndarray]
    shapes: list[ImageShape]
    pictures: list[np.ndarray]


@dataclass
class FlowBatches:
    """Makes micro-batches.

    A sample's index is its place in the endless stream, (step * accumulate + micro) * batch + place, so that a batch of
    64 and two micro-batches of 32 hold the same samples.
    """

    recipe: FlowRecipe
    source: Source | None
    channels: int
    cache: LatentCache | None = None
    validation_seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.validation_seed = key(self.recipe.seed, "validation") % 2**31

    def batch(self, step: int, micro: int) -> list[RawSample]:
        recipe = self.recipe
        first = (step * recipe.accumulate + micro) * recipe.batch
        return [self.sample(recipe.seed, step, first + place) for place in range(recipe.batch)]

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
        task, caption, images, shapes, pictures = self.content(seed, index)
        frames, height, width = shapes[0]
        return RawSample(
            index, task, "" if dropped and sigma is None else caption, images, shapes, pictures,
            normal((frames * height * width, self.channels), seed, "noise", step=step, sample=index),
            drawn if sigma is None else sigma,
        )  # fmt: skip

    def content(self, seed: int, index: int) -> Content:
        """What the sample shows, the same in every step."""
        draws, data = generator(seed, "task", sample=index), self.recipe.data
        if self.cache is not None:
            held_out = self.recipe.log.validation_samples
            place = len(self.cache) - 1 - index
            if seed != self.validation_seed:
                place = epoch_position(seed, index, len(self.cache) - held_out)
            cached = self.cache.read(place)
            # Which samples are edits was decided when the cache was made.
            task = "ti2i" if len(cached.latents) > 1 else choose(draws, {**data.tasks, "ti2i": 0.0})
            if task != "t2i" and not cached.pixels:
                raise RecipeError(
                    "recipe: data.cache must have been made with this recipe: it lacks references' pixels"
                )
            found = Content(task, cached.text, cached.latents, cached.shapes, cached.pixels)
        else:
            task = choose(draws, data.tasks)
            sample = self.drawn(seed, index, task)
            images, shapes = to_buckets([sample.image, *sample.references], data.buckets)
            found = Content(task, sample.caption, images, shapes, images)
        if task == "recon":
            return Content(task, KEEP_INSTRUCTION, found.images * 2, found.shapes * 2, found.pictures)
        return found._replace(pictures=found.pictures[1:])

    def drawn(self, seed: int, index: int, task: str | None = None) -> Sample:
        """The sample of the source: an edit, or a picture and its caption."""
        if task is None:
            task = choose(generator(seed, "task", sample=index), self.recipe.data.tasks)
        make = getattr(self.source, "edit" if task == "ti2i" else "sample", None)
        if make is None:
            raise RecipeError(
                f"recipe: data.tasks must not have ti2i: the source {self.recipe.data.source} has no edits"
            )
        return make(seed, index)

    def to_cache(self, index: int) -> tuple[str, list[np.ndarray], list[ImageShape]]:
        """Text, images and shapes of sample `index` for `write_cache`; the image of a reconstruction once."""
        sample = self.drawn(self.recipe.seed, index)
        return sample.caption, *to_buckets([sample.image, *sample.references], self.recipe.data.buckets)


def choose(draws: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One of the names, with a probability in proportion to its weight."""
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
