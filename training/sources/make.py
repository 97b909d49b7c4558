"""From the name in a recipe to its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_image_fast.training.data.screen import Screen
from qwen_image_fast.training.data.shard_index import INDEX
from qwen_image_fast.training.recipe.data import DRAWN, DataRecipe, PartRecipe, part_key
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.folder import ImageFolder
from qwen_image_fast.training.sources.pairs import EditPairs, has_pairs
from qwen_image_fast.training.sources.sample import Source
from qwen_image_fast.training.sources.shards import Shards
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.sources.synthesis import Synthesis
from qwen_image_fast.training.sources.table import SUFFIXES, Table

_DRAWING: dict[str, Any] = dict(zip(DRAWN, (Squares, Synthesis)))


def make_source(recipe: DataRecipe | PartRecipe) -> Source:
    """The source that `recipe.source` names; RecipeError for options and tasks that it does not have."""
    source = _named(recipe)
    for task, weight in recipe.tasks.items():
        needed = "edit" if task == "ti2i" else "sample"
        if weight > 0 and not hasattr(source, needed):
            has = "no edits" if needed == "edit" else "edits alone (data.tasks={ti2i: 1})"
            raise RecipeError(f"recipe: data.tasks must not have {task}: the source {recipe.source} has {has}")
    return source


def _named(recipe: DataRecipe | PartRecipe) -> Source:
    folder = Path(recipe.source).expanduser()
    try:
        if recipe.source in DRAWN:
            if recipe.filters:
                raise RecipeError(f"recipe: data.filters must be empty for {recipe.source}: its pictures are drawn")
            return _DRAWING[recipe.source](**recipe.options)
        if folder.is_file() and folder.suffix.lower() in SUFFIXES:
            return Table(str(folder), Screen(recipe.filters), **recipe.options)
        if folder.is_dir() and has_pairs(folder):
            return EditPairs(str(folder), Screen(recipe.filters), **recipe.options)
        if (folder / INDEX).is_file():
            return Shards(str(folder), Screen(recipe.filters), **recipe.options)
        if folder.is_dir():
            return ImageFolder(str(folder), Screen(recipe.filters), **recipe.options)
    except TypeError as error:
        raise RecipeError(f"recipe: data.options must fit the source {recipe.source}: {error}") from error
    raise RecipeError(
        f"recipe: data.source must be squares, synthesis, a folder of pictures or of pairs, shards with {INDEX} or a "
        f"table ({', '.join(SUFFIXES)}), got {recipe.source!r}"
    )


def make_sources(parts: Sequence[PartRecipe]) -> dict[str, Source]:
    """A source for each part by its key, one for all parts that take the same."""
    return {key: make_source(part) for key, part in {part_key(part): part for part in parts}.items()}
