"""Where images and captions come from; every source is a function of (seed, index)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from qwen_image_fast.training.randomness import epoch_position, generator
from qwen_image_fast.training.recipe import DataRecipe, RecipeError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class Sample:
    """image: uint8 [H, W, 3]. caption: describes it, or says how it comes from `references`, 0..N images."""

    image: np.ndarray
    caption: str
    references: Sequence[np.ndarray] = ()


class Source(Protocol):
    """A source of edits also has a method `edit` like `sample`, whose samples have references."""

    def sample(self, seed: int, index: int) -> Sample:
        """Sample `index` of the stream of `seed`, an image and its caption: always the same one."""


COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "black": (20, 20, 20)}
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}


class Squares:
    """A coloured square in one quarter of a white image: the smallest task with something to learn from the text.

    An edit shows the square in another colour first.
    """

    def __init__(self, size: int = 64):
        self.size = size

    def sample(self, seed: int, index: int) -> Sample:
        colour, _, place = self._choose(seed, index)
        return Sample(self.draw(colour, place), f"{colour} square, {place}")

    def edit(self, seed: int, index: int) -> Sample:
        colour, before, place = self._choose(seed, index)
        return Sample(self.draw(colour, place), f"make it {colour}", (self.draw(before, place),))

    def _choose(self, seed: int, index: int) -> tuple[str, str, str]:
        rng = generator(seed, "squares", sample=index)
        colour, before = rng.choice(list(COLOURS), 2, replace=False).tolist()
        return colour, before, str(rng.choice(list(PLACES)))

    def draw(self, colour: str, place: str) -> np.ndarray:
        half = self.size // 2
        y, x = (half * side for side in PLACES[place])
        image = np.full((self.size, self.size, 3), 255, dtype=np.uint8)
        image[y : y + half, x : x + half] = COLOURS[colour]
        return image


class ImageFolder:
    """Images of a folder, captions in text files of the same name; each epoch has an order of its own."""

    def __init__(self, folder: str):
        root = Path(folder)
        self.files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise RecipeError(f"recipe: data.source must be a folder of images, got {folder}, which has none")
        for path in self.files:
            if not path.with_suffix(".txt").is_file():
                raise RecipeError(f"recipe: every image needs its caption, there is no {path.with_suffix('.txt')}")

    def sample(self, seed: int, index: int) -> Sample:
        path = self.files[epoch_position(seed, index, len(self.files))]
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        return Sample(pixels, path.with_suffix(".txt").read_text(encoding="utf-8").strip())


class Synthesis:
    """Rendered text and shapes of `training.synthesis`.

    Args:
        preset: "tiny": `options` are the arguments of `synthesis.recipe.tiny`; "": the fields of a `SynthesisRecipe`.
    """

    def __init__(self, preset: str = "", **options: Any):
        from qwen_image_fast.training.synthesis.recipe import SynthesisRecipe, tiny

        if preset not in ("", "tiny"):
            raise RecipeError(f"recipe: data.options.preset must be tiny or empty, got {preset!r}")
        self.recipe = tiny(**options) if preset else SynthesisRecipe.from_dict(options)

    def sample(self, seed: int, index: int) -> Sample:
        from qwen_image_fast.training.synthesis.generator import make

        made = make(self.recipe, seed, index)
        return Sample(made.image, made.caption)

    def edit(self, seed: int, index: int) -> Sample:
        from qwen_image_fast.training.synthesis.editing import make_edit

        made = make_edit(self.recipe, seed, index)
        return Sample(made.target, made.instruction, (made.source,))


def make_source(recipe: DataRecipe) -> Source:
    """The source that `recipe.source` names; RecipeError for options that it does not have."""
    named: dict[str, Any] = {"squares": Squares, "synthesis": Synthesis}
    try:
        if recipe.source in named:
            return named[recipe.source](**recipe.options)
        if Path(recipe.source).is_dir():
            return ImageFolder(recipe.source, **recipe.options)
    except TypeError as error:
        raise RecipeError(f"recipe: data.options must fit the source {recipe.source}: {error}") from error
    raise RecipeError(f"recipe: data.source must be squares, synthesis or a folder, got {recipe.source!r}")


def nearest_bucket(height: int, width: int, buckets: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The bucket with the nearest aspect ratio, on a logarithmic scale; of equally near ones the nearest area."""

    def distance(bucket: Sequence[int]) -> tuple[float, float]:
        ratio = math.log(height / width) - math.log(bucket[0] / bucket[1])
        return round(abs(ratio), 9), abs(math.log(height * width / (bucket[0] * bucket[1])))

    best = min(buckets, key=distance)
    return best[0], best[1]


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale an image until it covers `size` and cut what is left over on both sides; uint8 [height, width, 3]."""
    height, width = size
    if image.shape[:2] == size:
        return image
    scale = max(height / image.shape[0], width / image.shape[1])
    inner = max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale))
    scaled = Image.fromarray(image).resize(inner[::-1], Image.Resampling.LANCZOS)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height)))
