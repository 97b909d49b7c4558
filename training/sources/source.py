"""Where images and captions come from; every source is a function of (seed, index)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.screen import Screen
from qwen_image_fast.training.data.shard_index import INDEX, ShardIndex
from qwen_image_fast.training.randomness import epoch_position, generator
from qwen_image_fast.training.recipe.curriculum import part_key
from qwen_image_fast.training.recipe.run import DataRecipe, PartRecipe, RecipeError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class Sample:
    """image: uint8 [H, W, 3]. caption: describes it, or says how it comes from `references`, 0..N images.

    origin: which file or record it is; empty where it was drawn.
    """

    image: np.ndarray
    caption: str
    references: Sequence[np.ndarray] = ()
    origin: str = ""


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
    """Images of a folder, captions in text files of the same name; each epoch has an order of its own.

    Args:
        screen: says which pictures are used.
    """

    def __init__(self, folder: str, screen: Screen | None = None):
        self.screen = screen or Screen({})
        root = Path(folder)
        self.files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise RecipeError(f"recipe: data.source must be a folder of images, got {folder}, which has none")
        for path in self.files:
            if not path.with_suffix(".txt").is_file():
                raise RecipeError(f"recipe: every image needs its caption, there is no {path.with_suffix('.txt')}")

    def sample(self, seed: int, index: int) -> Sample:
        path = self.files[epoch_position(seed, index, len(self.files))]
        caption, fault = "", ""
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            fault = f"its caption cannot be read: {error}"
        try:
            content = path.read_bytes()
        except OSError as error:
            content, fault = b"", f"the file cannot be read: {error.strerror}"
        record = Record(content, {"raw": caption}, origin=str(path), fault=fault)
        return Sample(self.screen.pixels(record), caption, origin=str(path))


class Shards:
    """The records of shards that `data filter` wrote, in an order of its own in each epoch.

    Args:
        folder: has `index.parquet`. screen: says which pictures are used.
        captions: weights of the kinds of captions (raw, recaption, fused) to draw from; a record that lacks the kind
            drawn gives its best one. Empty: the best one.
        where: values that a column of the index or a field of its metadata may have, such as
            {category: [Nature, People], text_language: [Non-text]}.
        least, most: limits of numbers in the metadata, inclusive.
    """

    def __init__(
        self,
        folder: str,
        screen: Screen,
        captions: Mapping[str, float] | None = None,
        where: Mapping[str, Sequence[str]] | None = None,
        least: Mapping[str, float] | None = None,
        most: Mapping[str, float] | None = None,
    ):
        self.index = ShardIndex(folder, where or {}, least or {}, most or {})
        self.screen, self.captions = screen, dict(captions or {})

    def sample(self, seed: int, index: int) -> Sample:
        record = self.index.read(epoch_position(seed, index, len(self.index)))
        caption = record.caption
        if self.captions:
            kinds, total = list(self.captions), sum(self.captions.values())
            draws = generator(seed, "caption", sample=index)
            kind = draws.choice(kinds, p=[self.captions[name] / total for name in kinds])
            caption = record.captions.get(str(kind), caption)
        return Sample(self.screen.pixels(record), caption, origin=record.origin)


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


def make_source(recipe: DataRecipe | PartRecipe) -> Source:
    """The source that `recipe.source` names; RecipeError for options that it does not have."""
    named: dict[str, Any] = {"squares": Squares, "synthesis": Synthesis}
    folder = Path(recipe.source)
    try:
        if recipe.source in named:
            if recipe.filters:
                raise RecipeError(f"recipe: data.filters must be empty for {recipe.source}: its pictures are drawn")
            return named[recipe.source](**recipe.options)
        if (folder / INDEX).is_file():
            return Shards(recipe.source, Screen(recipe.filters), **recipe.options)
        if folder.is_dir():
            return ImageFolder(recipe.source, Screen(recipe.filters), **recipe.options)
    except TypeError as error:
        raise RecipeError(f"recipe: data.options must fit the source {recipe.source}: {error}") from error
    raise RecipeError(
        f"recipe: data.source must be squares, synthesis, a folder or shards with {INDEX}, got {recipe.source!r}"
    )


def make_sources(parts: Sequence[PartRecipe]) -> dict[str, Source]:
    """A source for each part by its key, one for all parts that take the same."""
    return {key: make_source(part) for key, part in {part_key(part): part for part in parts}.items()}


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
