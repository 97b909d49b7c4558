"""Edits by example: pictures before and after, and the instruction that leads from one to the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_image_fast.training.data.collect import IMAGE_SUFFIXES, read_picture
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.screen import Screen
from qwen_image_fast.training.randomness import epoch_position
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.sample import Sample

BEFORE, AFTER = "before", "after"
TABLE = "pairs.jsonl"


@dataclass(frozen=True)
class Pair:
    """after: the target. before: its references, one or more. instruction: what was done. fault: why it cannot be
    used, a sentence."""

    after: Path
    before: tuple[Path, ...]
    instruction: str
    fault: str = ""


class EditPairs:
    """Pairs of a folder, in an order of its own in each epoch. The folder has

    - two folders `before/` and `after/` with pictures of the same names, or
    - pictures `NAME.before.png` and `NAME.after.png`, of any suffix, or
    - `pairs.jsonl`, a line `{"image": ..., "references": [...], "instruction": ...}` for each pair, with paths relative
      to the folder.

    In the first two, the instruction is in `NAME.txt`, beside the pictures or in `after/`, or `instruction` for all.

    Args:
        screen: says which pictures are used; both of a pair must pass.
        instruction: of pairs that have none of their own.

    Raises:
        RecipeError: a picture has no partner, a pair no instruction, the table a line that is no pair.
    """

    def __init__(self, folder: str, screen: Screen | None = None, instruction: str = ""):
        self.screen = screen or Screen({})
        root = Path(folder)
        found = _table(root) if (root / TABLE).is_file() else _by_name(root, instruction)
        self.pairs = list(found)
        if not self.pairs:
            raise RecipeError(f"recipe: data.source must hold pairs, got {folder}, which has none")

    def edit(self, seed: int, index: int) -> Sample:
        pair = self.pairs[epoch_position(seed, index, len(self.pairs))]
        after, *before = (self._pixels(path, pair.fault) for path in (pair.after, *pair.before))
        return Sample(after, pair.instruction, before, origin=str(pair.after))

    def _pixels(self, path: Path, fault: str) -> np.ndarray:
        content, unread = read_picture(path)
        return self.screen.pixels(Record(content, origin=str(path), fault=fault or unread))


def has_pairs(folder: Path) -> bool:
    """Whether a folder is one for `EditPairs`."""
    both = (folder / BEFORE).is_dir() and (folder / AFTER).is_dir()
    return both or (folder / TABLE).is_file() or any(folder.glob(f"*.{BEFORE}.*"))


def _pictures(files: Sequence[Path]) -> dict[str, Path]:
    """By name without the suffix; RecipeError for two of one name."""
    found: dict[str, Path] = {}
    for path in sorted(files):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise RecipeError(f"recipe: {path} and {found[path.stem].name} have the same name: keep one of them")
            found[path.stem] = path
    return found


def _by_name(root: Path, instruction: str) -> Iterator[Pair]:
    if (root / BEFORE).is_dir():
        before = _pictures(list((root / BEFORE).iterdir()))
        after = _pictures(list((root / AFTER).iterdir()))
        texts = [root / AFTER, root]
    else:
        before, after = (
            {Path(name).stem: path for name, path in _pictures(list(root.glob(f"*.{side}.*"))).items()}
            for side in (BEFORE, AFTER)
        )
        texts = [root]
    if alone := sorted(before.keys() ^ after.keys()):
        lonely = before.get(alone[0]) or after[alone[0]]
        raise RecipeError(f"recipe: every picture needs its partner, {lonely} has none ({len(alone)} of them)")
    for name, path in after.items():
        file = next((folder / f"{name}.txt" for folder in texts if (folder / f"{name}.txt").is_file()), None)
        text, fault = instruction, ""
        try:
            text = file.read_text(encoding="utf-8-sig").strip() if file else instruction
        except (OSError, UnicodeDecodeError) as error:
            fault = f"its instruction {file} cannot be read: {error}"
        if not (text or fault):
            raise RecipeError(
                f"recipe: every pair needs an instruction, {path} has none: write {texts[0] / name}.txt, or set "
                "data.options.instruction for all"
            )
        yield Pair(path, (before[name],), text, fault)


def _table(root: Path) -> Iterator[Pair]:
    try:
        lines = (root / TABLE).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe: {root / TABLE} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {root / TABLE}"
        try:
            row = json.loads(line)
            image, references, text = row["image"], row["references"], row["instruction"]
            references = [references] if isinstance(references, str) else references
            paths = [root / name for name in (image, *references)]
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f'recipe: {where} must be {{"image": path, "references": [path, ...], "instruction": text}}: {error!r}'
            ) from error
        if not (isinstance(text, str) and text.strip() and references):
            raise RecipeError(f"recipe: {where} must have an instruction and at least one reference")
        for path in paths:
            if not path.is_file():
                raise RecipeError(f"recipe: {where} names {path}, which is not there")
        yield Pair(paths[0], tuple(paths[1:]), text.strip())
