"""Batches of pairs of pictures of which one is preferred, from a file: functions of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_image_fast.training.batches.batches import Batch, RawSample, to_buckets
from qwen_image_fast.training.batches.noise import noise_level
from qwen_image_fast.training.randomness import epoch_position, generator, normal
from qwen_image_fast.training.recipe.curriculum import Change
from qwen_image_fast.training.recipe.post import PostRecipe
from qwen_image_fast.training.sources.lines import PairLine, digest, pair_lines, pictures_of


class PairBatches:
    """Micro-batches of `recipe.batch` pairs: chosen, rejected, chosen, rejected, ... Both have the same noise at the
    same level and one size, so that what they differ by is what is learnt. For kind sft the chosen ones alone.

    Args:
        channels: of packed latents. first: step of the run at which the stage begins.
    """

    def __init__(self, recipe: PostRecipe, channels: int, first: int = 0):
        self.recipe, self.channels, self.first = recipe, channels, first
        self.both = recipe.kind == "dpo"
        self.pairs: Sequence[PairLine] = pair_lines(recipe.pairs, both=self.both)
        self.read = {recipe.pairs: digest(recipe.pairs)}

    def use(self, changes: Sequence[Change]) -> None:
        """There is no mixture that could change."""

    def batch(self, step: int, micro: int) -> Batch:
        recipe = self.recipe
        begin = ((step - self.first) * recipe.accumulate + micro) * recipe.batch
        return Batch(raw for index in range(begin, begin + recipe.batch) for raw in self.pair(step, index))

    def pair(self, step: int, index: int) -> list[RawSample]:
        recipe, seed = self.recipe, self.recipe.seed
        line = self.pairs[epoch_position(seed, index, len(self.pairs))]
        second = [line.rejected] if self.both and line.rejected else []
        pictures = pictures_of([line.chosen, *second, *line.references])
        images, shapes = to_buckets(pictures, recipe.data)
        count = 1 + len(second)
        if count == 2 and images[1].shape != images[0].shape:
            raise ValueError(
                f"pairs: line {line.number} of {recipe.pairs}: chosen and rejected must have one shape, they have "
                f"{pictures[0].shape[:2]} and {pictures[1].shape[:2]}"
            )
        frames, height, width = shapes[0]
        tokens = frames * height * width
        level = noise_level(generator(seed, "pair", step=step, sample=index), recipe.sigma, tokens)
        noise = normal((tokens, self.channels), seed, "noise", step=step, sample=index)
        references, places = images[count:], shapes[count:]
        task = "ti2i" if references else "t2i"
        return [
            RawSample(index, task, line.prompt, [image, *references], [shape, *places], list(references), noise, level)
            for image, shape in zip(images[:count], shapes[:count])
        ]
