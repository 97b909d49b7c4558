"""Folders of edits by example: pictures before and after, and the instruction that leads from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_image_fast.training.data.collect import CAPTION_SUFFIXES, IMAGE_SUFFIXES, read_picture
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.example import Example
from qwen_image_fast.training.sources.folder import MASK, by_stem, skipped, walk
from qwen_image_fast.training.text_files import beside, decoded

BEFORE, AFTER = "before", "after"
TABLE = "pairs.jsonl"


@dataclass(frozen=True)
class Pair:
    """after: the target. before: what it was made from. text: the file of the instruction. mask: white where the loss
    counts."""

    after: Path
    before: Path
    text: Path | None
    mask: Path | None


class Pairs:
    """Edits of a folder, which has

    - two folders `before/` and `after/` with pictures of the same names, and `mask/` where there are masks, or
    - pictures `NAME.before.png`, `NAME.after.png` and `NAME.mask.png`, of any suffix.

    The instruction of a pair is in `NAME.txt` or `NAME.caption`, beside the pictures or in `after/` or `before/`.

    Raises:
        RecipeError: a picture has no partner, or two have one name.
    """

    edits = True

    def __init__(self, root: Path):
        pictures, others, hidden = walk(root)
        sides: dict[str, dict[Path, Path]] = {BEFORE: {}, AFTER: {}, MASK: {}}
        unused = []
        folders = in_folders(root)
        for path in pictures:
            if folders:
                top, *rest = path.relative_to(root).parts
                side, name = top, Path(*rest) if rest else Path()
            else:
                side, name = Path(path.stem).suffix[1:], path.relative_to(root).with_name(Path(path.stem).stem + ".x")
            if side in sides and name != Path():
                sides[side][path] = name
            else:
                unused.append(path)
        before, after, masks = (by_stem({found[p].with_name(found[p].stem + p.suffix): p for p in found})
                                for found in sides.values())  # fmt: skip
        if alone := sorted(before.keys() ^ after.keys()):
            lonely = before.get(alone[0]) or after[alone[0]]
            raise RecipeError(f"recipe: every picture needs its partner, {lonely} has none ({len(alone)} of them)")
        if not after:
            raise RecipeError(f"recipe: data.source must hold pairs, got {root}, which has none")
        texts = {path for path in others if path.suffix.lower() in CAPTION_SUFFIXES}
        places = [root / AFTER, root, root / BEFORE] if folders else [root]
        used: set[Path] = set()
        self.pairs = []
        for name, path in after.items():
            there = (beside(p / f"{name}.x", *CAPTION_SUFFIXES) for p in places)
            text = next((file for file in there if file in texts), None)
            used |= {text} if text else set()
            self.pairs.append(Pair(path, before[name], text, masks.pop(name, None)))
        self.skipped = skipped(root, [*unused, *masks.values(), *(p for p in others if p not in used)], hidden)
        self.folders = [name.parent.as_posix() for name in after]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, place: int) -> Example:
        pair = self.pairs[place]
        captions, fault = {}, ""
        if pair.text is not None:
            content, fault = read_picture(pair.text)
            try:
                captions = {"raw": decoded(content)}
            except ValueError as error:
                fault = f"its instruction {pair.text} {error}"
        content, unread = read_picture(pair.after)
        target = Record(content, captions, origin=str(pair.after), fault=fault or unread)
        return Example(target, (_record(pair.before),), None if pair.mask is None else _record(pair.mask))


def _record(path: Path) -> Record:
    content, fault = read_picture(path)
    return Record(content, origin=str(path), fault=fault)


def in_folders(root: Path) -> bool:
    return (root / BEFORE).is_dir() and (root / AFTER).is_dir()


def has_pairs(folder: Path) -> bool:
    """Whether a folder is one for `Pairs`."""
    sides: Sequence[str] = (BEFORE, AFTER)
    named = (path for side in sides for path in folder.glob(f"*.{side}.*"))
    return in_folders(folder) or any(path.suffix.lower() in IMAGE_SUFFIXES for path in named)
