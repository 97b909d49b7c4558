"""Batches of a flow-matching run: which sample, which task, which noise; all functions of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.training.objectives.flow import logit_normal
from qwen_image_fast.training.randomness import epoch_position, generator, key, normal
from qwen_image_fast.training.recipe import FlowRecipe, RecipeError
from qwen_image_fast.training.tiny.latents import LatentCache
from qwen_image_fast.training.tiny.sources import Source, fit, nearest_bucket

# What a reconstruction sample asks for.
KEEP_INSTRUCTION = "Keep the image as it is."
# Validation samples come from a stream of their own, at these noise levels (torchtitan's stratified validation).
VALIDATION_SIGMAS = (0.25, 0.5, 0.75, 1.0)


@dataclass
class RawSample:
    """A sample before any model has seen it.

    images: the target and its references, uint8 [H, W, 3], or packed latents float [tokens, channels] from a cache.
    shapes: (frames, height, width) in tokens of each. index: its position in the stream of samples.
    """

    index: int
    task: str
    caption: str
    images: list[np.ndarray]
    shapes: list[ImageShape]
    noise: Tensor
    sigma: float


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
        task, caption, images, shapes = self.content(seed, index)
        frames, height, width = shapes[0]
        return RawSample(
            index, task, "" if dropped and sigma is None else caption, images, shapes,
            normal((frames * height * width, self.channels), seed, "noise", step=step, sample=index),
            drawn if sigma is None else sigma,
        )  # fmt: skip

    def content(self, seed: int, index: int, recon: bool = True) -> tuple[str, str, list[np.ndarray], list[ImageShape]]:
        """Task, text, the target and its references, their shapes; the same for every step that shows the sample.

        `recon=False` leaves out the reference of a reconstruction: a cache holds its image once.
        """
        draws, data = generator(seed, "task", sample=index), self.recipe.data
        if self.cache is not None:
            held_out = self.recipe.log.validation_samples
            place = len(self.cache) - 1 - index
            if seed != self.validation_seed:
                place = epoch_position(seed, index, len(self.cache) - held_out)
            caption, images, shapes = self.cache.read(place)
            # Which samples are edits was decided when the cache was made.
            task = "ti2i" if len(images) > 1 else choose(draws, {**data.tasks, "ti2i": 0.0})
        else:
            task = choose(draws, data.tasks)
            make = getattr(self.source, "edit" if task == "ti2i" else "sample", None)
            if make is None:
                raise RecipeError(f"recipe: data.tasks must not have ti2i: the source {data.source} has no edits")
            sample = make(seed, index)
            images, shapes = to_buckets([sample.image, *sample.references], data.buckets)
            caption = sample.caption
        if task == "recon" and recon:
            return task, KEEP_INSTRUCTION, [images[0]] * 2, [shapes[0]] * 2
        return task, caption, images, shapes


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
