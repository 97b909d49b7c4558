"""Batches of a flow-matching run: which sample, which task, which noise; all functions of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.training.batches.latents import LatentCache, Made
from qwen_image_fast.training.batches.mixture import Order, Segment, order_of
from qwen_image_fast.training.batches.noise import noise_level, weight_at
from qwen_image_fast.training.batches.replace import usable
from qwen_image_fast.training.data.screen import Rejected
from qwen_image_fast.training.randomness import epoch_position, generator, key, normal
from qwen_image_fast.training.recipe.curriculum import Change, Curriculum, one_stage
from qwen_image_fast.training.recipe.data import TASKS, DataRecipe, PartRecipe, part_key
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.sources.buckets import fit, size_for, sizes_for, token_weights, too_small
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
    where a producer has run it. rejected: origin and reason of those in whose place it stands. weight: what its loss
    counts. token_weights: float32 [tokens] of its target, what each counts in it; None: all alike. keep: the model
    without adapters is what it teaches.
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
    weight: float = 1.0
    token_weights: np.ndarray | None = None
    keep: bool = False


class Batch(list[RawSample]):
    """The samples of a micro-batch."""

    @property
    def rejected(self) -> list[tuple[int | None, str, str]]:
        """Index, origin and reason of the samples that others stand for."""
        return [(raw.index, *why) for raw in self for why in raw.rejected]


class Content(NamedTuple):
    """Of a sample: task, text, target and references, their shapes, the references' pixels, what was rejected, what its
    loss and its tokens count, and whether the model without adapters is what it teaches."""

    task: str
    caption: str
    images: list[np.ndarray]
    shapes: list[ImageShape]
    pictures: list[np.ndarray]
    rejected: list[tuple[str, str]]
    weight: float = 1.0
    token_weights: np.ndarray | None = None
    keep: bool = False


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
        # Parts that draw their pictures have others for another seed; those of files, the ones that are held out.
        weights = tuple((k, part.weight) for k, part in self.parts.items() if self._has_others(k) and part.weight > 0)
        self._validation_order = Order(self.validation_seed, [Segment(0, weights)]) if weights else None
        self.use(())

    def use(self, changes: Sequence[Change]) -> None:
        """Follow changes of the mixture."""
        self.order = order_of(self.run, changes)

    @property
    def source(self) -> Source | None:
        """Of the first part."""
        return self.sources.get(next(iter(self.parts)))

    def _has_others(self, part: str) -> bool:
        """Whether a part has samples that training never sees."""
        return bool(getattr(self.sources.get(part), "held_places", True))

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` of step `step` of the run; RecipeError where the data cannot be used."""
        recipe = self.recipe
        part, parts = self.share
        count = recipe.batch // parts
        first = self.run.sample_of(step) + micro * recipe.batch + part * count
        return Batch(self.sample(recipe.seed, step, index) for index in range(first, first + count))

    def validation(self) -> list[RawSample]:
        """Samples that training never sees, each once at every level, without text dropout; none where no part has
        any."""
        count = self.recipe.log.validation_samples
        if self.cache is not None and not self.cache.meta.get("held_out", count):
            return []
        if self.cache is None and self._validation_order is None:
            return []
        return [
            self.sample(self.validation_seed, 0, i, sigma=sigma) for sigma in VALIDATION_SIGMAS for i in range(count)
        ]

    def sample(self, seed: int, step: int, index: int, sigma: float | None = None) -> RawSample:
        recipe, draws = self.recipe, generator(seed, "sample", step=step, sample=index)
        dropped = float(draws.random()) < recipe.data.text_dropout
        made = self.content(seed, index)
        frames, height, width = made.shapes[0]
        level = noise_level(draws, recipe.sigma, height * width) if sigma is None else sigma
        counts = made.weight * weight_at(level, recipe.sigma) if sigma is None else 1.0
        return RawSample(
            index, made.task, "" if dropped and sigma is None else made.caption, made.images, made.shapes,
            made.pictures,
            normal((frames * height * width, self.channels), seed, "noise", step=step, sample=index),
            level, made.rejected, None, counts, made.token_weights, made.keep and sigma is None,
        )  # fmt: skip

    def content(self, seed: int, index: int) -> Content:
        """What the sample shows, the same in every step."""
        data = self.recipe.data
        if self.cache is not None:
            trained = len(self.cache) - self.cache.meta.get("held_out", self.recipe.log.validation_samples)
            if seed == self.validation_seed:
                place = trained + index % (len(self.cache) - trained)
            else:
                place = epoch_position(seed, index, trained)
            cached = self.cache.read(place)
            # Which samples are edits was decided when the cache was made.
            draws = generator(seed, "task", sample=index)
            task = "ti2i" if len(cached.latents) > 1 else choose(draws, {**data.tasks, "ti2i": 0.0})
            if task != "t2i" and not cached.pixels:
                raise RecipeError(
                    "recipe: data.cache must have been made with this recipe: it lacks references' pixels"
                )
            found = Content(
                task, cached.text, cached.latents, cached.shapes, cached.pixels, [], 1.0, cached.token_weights
            )
        else:
            task, sample, rejected, part = self.drawn(seed, index)
            images, shapes = to_buckets([sample.image, *sample.references], data)
            found = Content(
                task,
                sample.caption,
                images,
                shapes,
                images,
                rejected,
                part.loss_weight,
                masked(sample, images, data),
                part.keep,
            )
        if task == "recon":
            return found._replace(caption=KEEP_INSTRUCTION, images=found.images * 2, shapes=found.shapes * 2)
        return found._replace(pictures=found.pictures[1:])

    def drawn(self, seed: int, index: int) -> tuple[str, Sample, list[tuple[str, str]], PartRecipe]:
        """The task of a sample, what its source gives for it, an edit or a picture and its caption, what that stands
        for, and the part of the mixture."""
        validates = seed == self.validation_seed and self._validation_order is not None
        order = self._validation_order if validates and self._validation_order else self.order
        of, position = order.place(index)
        part = self.parts[of]
        task = choose(generator(seed, "task", sample=index), part.tasks)
        source: Any = self.sources[of]
        if validates and hasattr(source, "held_out"):
            return (
                task,
                *usable(lambda _, place: self._whole(source.held_out(place, task == "ti2i")), seed, position),
                part,
            )
        make = getattr(source, "edit" if task == "ti2i" else "sample", None)
        if make is None:
            raise RecipeError(f"recipe: data.tasks must not have ti2i: the source {part.source} has no edits")
        # Two parts that draw their samples must not draw the same ones.
        alone = len({part_key(p) for stage in self.run.stages for p in stage.recipe.data.parts}) == 1
        made = usable(lambda s, place: self._whole(make(s, place)), seed if alone else key(seed, of) % 2**31, position)
        return task, *made, part

    def _whole(self, sample: Sample) -> Sample:
        """A sample some of whose loss counts; `Rejected` where all the white of its mask would be cut off, or a picture
        would be enlarged although it must not."""
        shapes = [image.shape for image in (sample.image, *sample.references)]
        if fault := too_small(shapes, self.recipe.data.upscale):
            raise Rejected(sample.origin, f"too_small: {fault}")
        if sample.mask is not None and not self.recipe.data.mask_floor:
            data = self.recipe.data
            size = size_for(sample.image.shape[0], sample.image.shape[1], data.sizes, data.upscale)
            if not token_weights(fit(sample.mask, size)).any():
                raise Rejected(sample.origin, "empty_mask: all the white of its mask is cut off")
        return sample

    def edits(self, count: int) -> tuple[list[Sample], list[tuple[str, str]]]:
        """Held-out edits of the first part to look at, and what they stand for; none where it has no edits. Where it
        holds none out, some of those it is trained on."""
        source: Any = self.source
        if not hasattr(source, "edit"):
            return [], []
        make = source.edit
        if getattr(source, "held_places", None):
            count = min(count, len(source.held_places))

            def make(_: int, place: int) -> Sample:
                return source.held_out(place, True)

        made = [usable(lambda s, place: self._whole(make(s, place)), self.validation_seed, i) for i in range(count)]
        return [sample for sample, _ in made], [why for _, rejected in made for why in rejected]

    @property
    def to_hold_out(self) -> int:
        """Samples at the end of a cache that are for validation."""
        return self.recipe.log.validation_samples if self._validation_order else 0

    def to_cache(self, index: int, count: int) -> Made:
        """Sample `index` for `write_cache`; from `count` on those of validation. The image of a reconstruction once."""
        validates = index >= count
        seed = self.validation_seed if validates else self.recipe.seed
        _, sample, rejected, _ = self.drawn(seed, index - count if validates else index)
        images, shapes = to_buckets([sample.image, *sample.references], self.recipe.data)
        return Made(sample.caption, images, shapes, rejected, masked(sample, images, self.recipe.data))


def choose(draws: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One of the tasks, with a probability in proportion to its weight; in whatever order they are written."""
    weights = {task: weights[task] for task in TASKS if task in weights}
    total = sum(weights.values())
    if total == 0:
        raise RecipeError("recipe: data.tasks must give t2i or recon a weight: the cache has samples that are no edits")
    return str(draws.choice(list(weights), p=[w / total for w in weights.values()]))


def to_buckets(images: Sequence[np.ndarray], data: DataRecipe) -> tuple[list[np.ndarray], list[ImageShape]]:
    """Target and references cut to their buckets, and their shapes in tokens of 16 x 16 pixels."""
    sizes = sizes_for([image.shape for image in images], data.sizes, data.upscale)
    return [fit(image, size) for image, size in zip(images, sizes)], [(1, h // 16, w // 16) for h, w in sizes]


def masked(sample: Sample, images: Sequence[np.ndarray], data: DataRecipe) -> np.ndarray | None:
    """What each token of the target counts, by the sample's mask: from `data.mask_floor` where it is black to 1."""
    if sample.mask is None:
        return None
    height, width = images[0].shape[:2]
    white = token_weights(fit(sample.mask, (height, width)))
    return data.mask_floor + (1 - data.mask_floor) * white


class StagedBatches:
    """Makes the micro-batches of a whole run: each by its stage's maker, which has `batch` and `use`."""

    def __init__(self, run: Curriculum, makers: Sequence[Any]):
        self.run, self.makers = run, list(makers)

    def use(self, changes: Sequence[Change]) -> None:
        for maker in self.makers:
            maker.use(changes)

    def batch(self, step: int, micro: int) -> Any:
        return self.makers[self.run.number(step)].batch(step, micro)
