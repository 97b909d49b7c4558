"""Pictures and edits of one's own as a source: decoded, with their caption of this time, without what is held out."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping

import numpy as np
from PIL import Image

from qwen_image_fast.training.data.filters.picture import BrokenImage, Picture
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.screen import Rejected, Screen
from qwen_image_fast.training.randomness import epoch_position
from qwen_image_fast.training.recipe.captions import CaptionsRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.example import Catalogue, Example
from qwen_image_fast.training.sources.look import NO_WHITE, faults, has_white, look
from qwen_image_fast.training.sources.sample import Sample
from qwen_image_fast.training.sources.split import held_out, places_of
from qwen_image_fast.training.sources.texts import caption_of, plain_caption


class Examples:
    """The examples of a catalogue, in an order of its own in each epoch, without those that are held out.

    Args:
        name: of the source, for sentences. catalogue: what there is. screen: says which pictures are used.
        captions: what is made of them. repeats: how often an epoch has the pictures of folders, by their names or
            patterns; 1 where none fits. share: of the pictures that is held out.

    Raises:
        RecipeError: what `look` finds, or `repeats` name a folder that is not there.
    """

    def __init__(
        self, name: str, catalogue: Catalogue, screen: Screen | None = None, captions: CaptionsRecipe | None = None,
        repeats: Mapping[str, int] | None = None, share: float = 0.0,
    ):  # fmt: skip
        self.name, self.catalogue, self.screen = name, catalogue, screen or Screen({})
        self.captions = captions or CaptionsRecipe()
        self.repeats = self._repeats(repeats or {})
        self.seen = look(name, catalogue, self.captions)
        self.held = held_out(self.seen, share, len(catalogue))
        self.keep_out(self.held)

    def keep_out(self, held: Collection[str]) -> None:
        """Train on no picture of these hashes, which may be held out of another source too."""
        own, banned = places_of(self.seen, held)
        self.banned, self.held_places = frozenset(held), own if not self.held.isdisjoint(held) else []
        every = np.repeat(np.arange(len(self.catalogue)), self.repeats)
        self.places = every[~np.isin(every, list(banned))] if banned else every
        if not len(self.places):
            raise RecipeError(
                f"recipe: data.hold_out leaves nothing of {self.name} to train on: other sources hold its pictures out"
            )

    def _repeats(self, repeats: Mapping[str, int]) -> np.ndarray:
        found = np.ones(len(self.catalogue), np.int64)
        folders = self.catalogue.folders
        for pattern, count in repeats.items():
            chosen = [place for place, folder in enumerate(folders) if _inside(folder, pattern)]
            if not chosen:
                there = ", ".join(sorted(set(folders))[:10]) or "none"
                raise RecipeError(f"recipe: data.repeats must name folders of {self.name} ({there}), got {pattern!r}")
            found[chosen] = count
        return found

    def sample(self, seed: int, index: int) -> Sample:
        """A picture and its caption; of an edit its target."""
        example = self._example(seed, index)
        caption = caption_of(example.target, self.captions, seed, index)
        return self._made(example, caption, references=False)

    def held_out(self, index: int, edit: bool) -> Sample:
        """Held-out example `index` in the order of their hashes, from the first again behind the last."""
        example = self.catalogue.read(self.held_places[index % len(self.held_places)])
        return self._made(example, plain_caption(example.target, self.captions), references=edit)

    def _example(self, seed: int, index: int) -> Example:
        example = self.catalogue.read(int(self.places[epoch_position(seed, index, len(self.places))]))
        records = (example.target, *example.references)
        if self.banned and any(record.id in self.banned for record in records):
            raise Rejected(example.target.origin, "held_out: a copy of a picture that is held out for validation")
        return example

    def _made(self, example: Example, caption: str, references: bool) -> Sample:
        origin = example.target.origin
        if not (caption or example.target.fault):
            raise Rejected(origin, "no_caption: it has no caption")
        before = [self.screen.pixels(record) for record in example.references] if references else []
        target = self.screen.pixels(example.target)
        return Sample(
            target, caption, before, origin, None if example.mask is None else self._mask(example.mask, target)
        )

    def _mask(self, record: Record, target: np.ndarray) -> np.ndarray:
        """uint8 [height, width] of the target's size, whatever that of the mask is."""
        try:
            pixels = Picture(record).rgb
        except BrokenImage as error:
            raise Rejected(record.origin, f"broken_mask: {error}") from error
        if not has_white(pixels):
            raise Rejected(record.origin, f"empty_mask: {NO_WHITE}")
        grey = Image.fromarray(pixels).convert("L").resize(target.shape[1::-1], Image.Resampling.BILINEAR)
        return np.asarray(grey)

    def said(self) -> list[str]:
        """Sentences for a person about what is there."""
        kind, count = ("edits" if self.catalogue.edits else "pictures"), len(self.catalogue)
        looked = "" if len(self.seen) == count else f", {len(self.seen):,} of them looked at"
        held = f", {len(self.held)} held out for validation" if self.held else ", none held out for validation"
        there = {kind for seen in self.seen for kind in seen.kinds}
        absent = [
            f"{self.name}: data.captions.weights has no effect for {kind!r}, a kind of caption that no picture has"
            for kind in self.captions.weights
            if kind not in there
        ]
        if self.captions.default and not any(seen.bare for seen in self.seen):
            what = "edit has an instruction" if self.catalogue.edits else "picture has a caption"
            absent.append(f"{self.name}: data.captions.default has no effect: every {what} of its own")
        about = [*self.catalogue.skipped, *faults(self.seen), *absent, *self.screen.said()]
        return [f"{self.name}: {count:,} {kind}{looked}{held}", *about]


def _inside(folder: str, pattern: str) -> bool:
    """A folder is the one named, or stands in it."""
    parts = folder.split("/")
    return any(fnmatch.fnmatch("/".join(parts[: n + 1]), pattern.strip("/")) for n in range(len(parts)))


class Edits(Examples):
    """Examples with references: a task of edits has them, a reconstruction has the target alone."""

    def edit(self, seed: int, index: int) -> Sample:
        """A picture, its references, and the instruction that leads from them to it."""
        example = self._example(seed, index)
        return self._made(example, caption_of(example.target, self.captions, seed, index), references=True)
