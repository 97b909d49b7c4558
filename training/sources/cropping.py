"""What becomes of each picture's size before training: a table for a person, and a few sentences of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.buckets import covering, sizes_for, too_small
from qwen_image_fast.training.sources.examples import Examples

TABLE = "pictures.csv"
_COLUMNS = ("stage", "picture", "role", "height", "width", "trained_height", "trained_width", "scale", "cropped")


@dataclass(frozen=True)
class Cut:
    """A picture of (height, width) `shape` that is trained at `size`: scaled, then cut. role: target or reference."""

    origin: str
    role: str
    shape: tuple[int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        return covering(self.shape, self.size)[0]

    @property
    def cropped(self) -> float:
        """The share of it that is cut off."""
        return covering(self.shape, self.size)[1]


def cuts_of(source: Examples, data: DataRecipe) -> list[Cut]:
    """Of the pictures of a source that were looked at, targets and references."""
    found = []
    for seen in source.seen:
        if seen.fault:
            continue
        shapes = [shape for shape in seen.sizes if shape is not None]
        if too_small(shapes, data.upscale):
            continue
        for number, (shape, size) in enumerate(zip(shapes, sizes_for(shapes, data.sizes, data.upscale))):
            found.append(Cut(seen.origin, f"reference {number}" if number else "target", shape, size))
    return found


def small(source: Examples, data: DataRecipe) -> list[tuple[str, str]]:
    """Origin and fault of the pictures of a source that are too small to be trained at."""
    good = [(seen, [shape for shape in seen.sizes if shape is not None]) for seen in source.seen if not seen.fault]
    return [(seen.origin, fault) for seen, shapes in good if (fault := too_small(shapes, data.upscale))]


def left_out(source: Examples, data: DataRecipe) -> Iterator[str]:
    """A sentence about pictures of a source that are too small to be trained at.

    Raises:
        RecipeError: all are.
    """
    found = small(source, data)
    if not found:
        return
    origin, fault = found[0]
    if len(found) == sum(not seen.fault for seen in source.seen):
        raise RecipeError(f"recipe: data.source {source.name} has no picture that can be used: {origin}: {fault}")
    others = f" ({len(found)} pictures are too small)" if len(found) > 1 else ""
    yield f"{origin} will be left out: {fault}{others}"


def sentences(cuts: Sequence[Cut], data: DataRecipe) -> Iterator[str]:
    """How many pictures are trained at each size and what they lose; enlarged, small and unlike ones."""
    targets = [cut for cut in cuts if cut.role == "target"]
    by_size: dict[tuple[int, int], list[Cut]] = {}
    for cut in targets:
        by_size.setdefault(cut.size, []).append(cut)
    ordered = sorted(by_size.items(), key=lambda entry: -len(entry[1]))
    for (height, width), group in ordered[:9]:
        most, mean = max(group, key=lambda cut: cut.cropped), sum(cut.cropped for cut in group) / len(group)
        lost = (
            f"{mean:.0%} cut off on average, {most.cropped:.0%} at most ({most.origin})" if mean else "nothing cut off"
        )
        yield f"{len(group):6,} at {height} x {width}: {lost}"
    if rest := sum(len(group) for _, group in ordered[9:]):
        yield f"{rest:6,} at {len(ordered) - 9} more sizes, see {TABLE}"
    if enlarged := [cut for cut in targets if cut.scale > 1.0001]:
        most = max(enlarged, key=lambda cut: cut.scale)
        yield f"warning: {len(enlarged)} are enlarged, up to {most.scale:.1f} times ({most.origin}): they look soft"
    buckets = {tuple(bucket) for bucket in data.sizes}
    if small := [cut for cut in targets if cut.size not in buckets]:
        least = min(small, key=lambda cut: cut.size[0] * cut.size[1])
        yield (
            f"warning: {len(small)} are smaller than the buckets and are trained at their own size, down to "
            f"{least.size[0]} x {least.size[1]} ({least.origin}); data.upscale=true enlarges them"
        )
    yield from _unlike(cuts)


def _unlike(cuts: Sequence[Cut]) -> Iterator[str]:
    """Of edits whose pictures differ in size."""
    scaled, apart, target = [], [], None
    for cut in cuts:
        if cut.role == "target":
            target = cut
        elif target is not None and cut.shape != target.shape:
            (scaled if cut.size == target.size else apart).append((cut, target))
    for pairs, what in (
        (scaled, "are scaled to the size of their target"),
        (apart, "have another shape than their target and are cut on their own, so that places do not match"),
    ):
        if pairs:
            cut, after = pairs[0]
            sizes = f"{cut.shape[0]} x {cut.shape[1]} for {after.shape[0]} x {after.shape[1]}"
            yield f"{len(pairs)} references {what}, such as {sizes} ({cut.origin})"


def write_table(folder: Path, stages: Sequence[tuple[str, Sequence[Cut]]]) -> Path:
    """`pictures.csv`: a row for each picture of each stage."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(_COLUMNS)
    for stage, cuts in stages:
        for cut in cuts:
            rows.writerow(
                [stage, cut.origin, cut.role, *cut.shape, *cut.size, f"{cut.scale:.4f}", f"{cut.cropped:.4f}"]
            )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / TABLE, lambda file: file.write(text.getvalue().encode()))
    return folder / TABLE
