"""From the name in a recipe to its source."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_image_fast.training.data.collect import CAPTION_SUFFIXES
from qwen_image_fast.training.data.screen import Screen
from qwen_image_fast.training.data.shard_index import INDEX
from qwen_image_fast.training.recipe.captions import CaptionsRecipe
from qwen_image_fast.training.recipe.data import DRAWN, UNNAMED, DataRecipe, PartRecipe, part_key
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.example import Catalogue
from qwen_image_fast.training.sources.examples import Edits, Examples
from qwen_image_fast.training.sources.folder import Folder, skipped, walk
from qwen_image_fast.training.sources.hub import HUB, dataset_folder
from qwen_image_fast.training.sources.look import MOST
from qwen_image_fast.training.sources.pairs import TABLE, Pairs, has_pairs
from qwen_image_fast.training.sources.sample import Source
from qwen_image_fast.training.sources.shards import Shards, WebDataset
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.sources.synthesis import Synthesis
from qwen_image_fast.training.sources.table import SUFFIXES, Joined, Table

_DRAWING: dict[str, Any] = dict(zip(DRAWN, (Squares, Synthesis)))
PAIRS = "they are NAME.before.png and NAME.after.png, folders before and after, or a table with references"
_TARS = (".tar", ".tar.gz", ".tgz")


def make_source(recipe: DataRecipe | PartRecipe) -> Source:
    """The source that `recipe.source` names; RecipeError for options and tasks that it does not have."""
    part = recipe.parts[0] if isinstance(recipe, DataRecipe) else recipe
    source = _named(part)
    for task, weight in part.tasks.items():
        edits = hasattr(source, "edit")
        if weight > 0 and task == "ti2i" and not edits:
            if part.source in DRAWN:
                raise RecipeError(f"recipe: data.tasks must not have ti2i: the source {part.source} has no edits")
            raise RecipeError(
                f"recipe: edits are to be learned (data.tasks has ti2i), and {part.source} has no pairs of pictures: "
                f"{PAIRS}; pictures with captions are for --images"
            )
        if weight > 0 and task == "t2i" and isinstance(source, Edits):
            raise RecipeError(
                f"recipe: pictures are to be learned from captions (data.tasks has t2i), and {part.source} has pairs "
                "of pictures, which teach edits: give it as --pairs (data.tasks={ti2i: 1})"
            )
    return source


def _named(part: PartRecipe) -> Source:
    if not part.source:
        raise RecipeError(UNNAMED)
    if part.source in DRAWN:
        for name, value in (("filters", part.filters), ("repeats", part.repeats)):
            if value:
                raise RecipeError(f"recipe: data.{name} must be empty for {part.source}: its pictures are drawn")
        if part.captions != CaptionsRecipe():
            raise RecipeError(f"recipe: data.captions must be empty for {part.source}: it says what it draws")
        try:
            drawing = _DRAWING[part.source](**part.options)
        except TypeError as error:
            raise _misfit(part, error) from error
        if isinstance(drawing, Synthesis):
            drawing.check_effect(part.tasks.get("ti2i", 0) > 0)
        return drawing
    try:
        found = catalogue(part.source, part.options)
    except TypeError as error:
        raise _misfit(part, error) from error
    kind = Edits if found.edits else Examples
    return kind(part.source, found, Screen(part.filters), part.captions, part.repeats, part.hold_out)


def _misfit(part: PartRecipe, error: TypeError) -> RecipeError:
    what = str(error).partition("() ")[2] or str(error)
    return RecipeError(f"recipe: data.options must fit the source {part.source}: {what}")


def catalogue(source: str, options: dict[str, Any]) -> Catalogue:
    """What a folder, a table, a tar file or a data set of the hub has.

    A folder is, in this order: what `data filter` wrote, or its shards; pairs; tar shards; tables, of which those
    called `metadata.*` may stand in folders of it; pictures. The option `files` chooses tables and tar files of a
    folder by a pattern such as "data/train-*".
    """
    options = dict(options)
    root = dataset_folder(source) if source.startswith(HUB) else Path(source).expanduser()
    if root.is_file() and root.suffix.lower() in SUFFIXES:
        return Table(root, **options)
    if root.is_file() and root.name.lower().endswith(_TARS):
        return WebDataset([root], **options)
    if root.is_dir():
        for folder in (root, root / "shards"):
            if (folder / INDEX).is_file():
                return Shards(folder, **options)
        if (root / TABLE).is_file():
            return Table(root / TABLE, **options)
        if has_pairs(root):
            return Pairs(root, **options)
        pictures, others, hidden = walk(root)
        files = str(options.pop("files", "**"))
        chosen = [path for path in others if fnmatch.fnmatch(path.relative_to(root).as_posix(), files)]
        if tars := [path for path in chosen if path.name.lower().endswith(_TARS)]:
            return WebDataset(tars, **options)
        if tables := _tables(root, pictures, chosen):
            parts = [Table(table, **options) for table in tables]
            said = skipped(root, sorted({*others} - {*tables}), hidden)
            return Joined(parts, [*said, *_not_named(root, pictures, parts)])
        if files != "**":
            raise RecipeError(f"recipe: data.options.files must fit tables or tar files of {root}, got {files!r}")
        return Folder(root, **options)
    raise RecipeError(
        f"recipe: data.source must be squares, synthesis, a folder of pictures or of pairs, shards with {INDEX}, a "
        f"table ({', '.join(SUFFIXES)}), a .tar file or {HUB}owner/name, got {source!r}"
    )


def _tables(root: Path, pictures: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """The tables of a folder: those called metadata, wherever they stand; else, unless pictures have captions beside
    them, those in the folder itself and parquet files below it."""
    found = [path for path in others if path.suffix.lower() in SUFFIXES]
    if described := [path for path in found if path.stem == "metadata"]:
        return described
    beside = {path.with_suffix("") for path in others if path.suffix.lower() in CAPTION_SUFFIXES}
    if any(path.with_suffix("") in beside for path in pictures):
        return []
    return [path for path in found if path.parent == root or path.suffix.lower() == ".parquet"]


def _not_named(root: Path, pictures: Sequence[Path], tables: Sequence[Table]) -> list[str]:
    """A sentence about pictures beside tables that no row names."""
    if not pictures or sum(map(len, tables)) > MOST:
        return []
    named = {os.path.abspath(path) for table in tables for path in table.paths()}
    count = sum(os.path.abspath(path) not in named for path in pictures)
    return [f"{root}: {count} pictures stand in no table and are not used"] if count else []


def make_sources(parts: Sequence[PartRecipe]) -> dict[str, Source]:
    """A source for each part by its key, one for all parts that take the same. A picture that one of them holds out is
    trained on by none."""
    sources = {key: make_source(part) for key, part in {part_key(part): part for part in parts}.items()}
    files = [source for source in sources.values() if isinstance(source, Examples)]
    held = frozenset().union(*(source.held for source in files))
    for source in files:
        source.keep_out(held)
    return sources
