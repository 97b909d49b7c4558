"""A folder of pictures with their captions beside them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_image_fast.training.data.collect import CAPTION_SUFFIXES, IMAGE_SUFFIXES, record_of_picture
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.example import Example

# A mask of a picture NAME.png is NAME.mask.png.
MASK = "mask"


class Folder:
    """The pictures of a folder and of those in it, each with `NAME.txt`, `NAME.caption` or `NAME.json` beside it, and
    with `NAME.mask.png` (of any suffix) where only a part of it is to be learnt.

    Raises:
        RecipeError: there are no pictures, two have one name, or one has two captions.
    """

    edits = False

    def __init__(self, root: Path):
        found, others, hidden = walk(root)
        masks = {path for path in found if Path(path.stem).suffix == f".{MASK}"}
        self.masks = by_stem({path.with_name(Path(path.stem).stem + path.suffix): path for path in masks})
        self.files = [path for path in found if path not in masks]
        if not self.files:
            raise RecipeError(f"recipe: data.source must be a folder of images, got {root}, which has none")
        stems = by_stem({path: path for path in self.files})
        self.folders = [path.parent.relative_to(root).as_posix() for path in self.files]
        if alone := sorted(self.masks.keys() - stems.keys()):
            raise RecipeError(f"recipe: {self.masks[alone[0]]} is a mask and its picture is not there")
        beside = {path for path in others if path.suffix.lower() in (*CAPTION_SUFFIXES, ".json")}
        by_stem({path: path for path in beside if path.suffix.lower() != ".json"}, "captions")
        unused = [path for path in others if path not in beside or path.with_suffix("") not in stems]
        self.skipped = skipped(root, unused, hidden)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, place: int) -> Example:
        path = self.files[place]
        mask = self.masks.get(path.with_suffix(""))
        return Example(
            record_of_picture(path, str(path), {}), mask=record_of_picture(mask, str(mask), {}) if mask else None
        )


def walk(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures, other files, and hidden pictures or folders below a folder, each in order."""
    found: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    for folder, folders, names in os.walk(root, followlinks=True):
        found[2].extend(Path(folder, name) for name in folders if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in names):
            picture = path.suffix.lower() in IMAGE_SUFFIXES
            if not path.name.startswith("."):
                found[0 if picture else 1].append(path)
            elif picture:
                found[2].append(path)
    for paths in found:
        paths.sort()
    return found


def by_stem(paths: dict[Path, Path], what: str = "pictures") -> dict[Path, Path]:
    """Files by their paths without the suffix; RecipeError for two of one."""
    found: dict[Path, Path] = {}
    for name, path in sorted(paths.items()):
        other = found.setdefault(name.with_suffix(""), path)
        if other != path:
            raise RecipeError(f"recipe: {path} and {other.name} are two {what} of one name: keep one of them")
    return found


def skipped(root: Path, unused: Sequence[Path], hidden: Sequence[Path]) -> list[str]:
    """Sentences about files of a folder that are not used, a kind each."""
    return list(_said(root, unused, hidden))


def _said(root: Path, unused: Sequence[Path], hidden: Sequence[Path]) -> Iterator[str]:
    kinds = Counter(path.suffix.lower() or "no suffix" for path in unused)
    for kind, count in kinds.most_common(5):
        first = next(path for path in unused if (path.suffix.lower() or "no suffix") == kind)
        what = "have no picture" if kind in (*CAPTION_SUFFIXES, ".json") else "are of no kind that is read"
        yield f"{root}: {count} {kind} files {what}, such as {first.relative_to(root)}"
    if len(kinds) > 5:
        yield f"{root}: files of {len(kinds) - 5} more kinds are not read"
    if hidden:
        yield f"{root}: {len(hidden)} hidden files or folders are not read, such as {hidden[0].relative_to(root)}"
