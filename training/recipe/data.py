"""What a run learns from: sources, mixtures, sizes, tasks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from qwen_image_fast.training.recipe.captions import CaptionsRecipe
from qwen_image_fast.training.recipe.fields import must, must_be_at_least

TASKS = ("t2i", "ti2i", "recon")
DRAWN = ("squares", "synthesis")  # sources that draw their pictures
UNNAMED = (
    "recipe: no data are named: give --images, a folder of pictures with captions, --pairs, a folder of pictures "
    "before and after, or data.source: also a table, shards, synthesis or squares"
)
UNNAMED_PROMPTS = (
    "recipe: nothing to draw is named: give rollout.prompts, a file with a prompt a line, or data.source, whose "
    "captions are drawn; or --pairs, a file of pairs of pictures, for dpo and sft"
)


# Width to height of the report's nine shapes (arXiv 2508.02324, section 4.2).
RATIOS = (1.0, 2 / 3, 3 / 2, 3 / 4, 4 / 3, 9 / 16, 16 / 9, 1 / 3, 3.0)


@dataclass
class PartRecipe:
    """A part of a mixture. weight: its share of the samples, of all parts' weights. source, options, filters, repeats:
    as in `DataRecipe`. loss_weight: what the loss of its samples counts, as for pictures of the class that keep a model
    from forgetting it (prior preservation). keep: the model without its adapters is what its samples teach, and not
    their pictures, so that it stays at them what it is; they have noise as others, and only show where. tasks,
    captions: its own; empty: those of the mixture. hold_out: its own; below 0: that of the mixture. name: in
    `mixture.yaml`; empty: the source. Parts that take the same samples must have the same tasks, keep and loss_weight.
    """

    name: str = ""
    weight: float = 1.0
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    captions: CaptionsRecipe = field(default_factory=CaptionsRecipe)
    repeats: dict[str, int] = field(default_factory=dict)
    hold_out: float = -1.0
    loss_weight: float = 1.0
    keep: bool = False


@dataclass
class DataRecipe:
    """source: "squares" (a toy), "synthesis" (training.synthesis), a folder of pictures with captions beside them or in
    a table, of pairs of pictures, or of shards, a table, or "hub:owner/name", a data set of Hugging Face's hub.

    options: arguments of the source. mixture: several sources, instead of one. filters: fields of the recipe of
    `data filter` (`training/data/recipe.py`); what pictures of shards and folders must pass while the run goes on.
    captions: what is made of a source's captions. repeats: how often an epoch has the pictures of folders, by their
    names or patterns, such as {faces: 3}; those of all others once.
    hold_out: share of the pictures of files that training never sees, chosen by the hash of their bytes; validation and
    the edits to look at take them. It is rounded down, so fewer than 20 pictures have none at 0.05; 256 at most.
    buckets: allowed [height, width] in pixels; an image goes to the one of the nearest aspect ratio. sides: instead of
    buckets, the sides of squares whose areas are trained at, each in nine shapes from 1:3 to 3:1. upscale: enlarge
    pictures that are smaller than every bucket; false: they have a smaller size of that shape. kind vae, whose batches
    have one size, enlarges them always. mask_floor: what the loss counts where a mask is black. tasks: weights of
    t2i (text to image), ti2i (references and an instruction) and recon (the reference is the image). text_dropout:
    share of samples whose caption becomes "". cache: folder of latents made by `cache-latents`, of so many samples;
    encoded: folder in which a run keeps the latents, and the states of a condition encoder that does not learn, by a
    key of the picture, the caption and the model, for itself and later runs; both empty: encode on the fly.
    """

    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    mixture: list[PartRecipe] = field(default_factory=list)
    captions: CaptionsRecipe = field(default_factory=CaptionsRecipe)
    repeats: dict[str, int] = field(default_factory=dict)
    hold_out: float = 0.05
    buckets: list[list[int]] = field(default_factory=lambda: [[64, 64]])
    sides: list[int] = field(default_factory=list)
    upscale: bool = False
    mask_floor: float = 0.0
    tasks: dict[str, float] = field(default_factory=lambda: {"t2i": 1.0})
    text_dropout: float = 0.1
    cache: str = ""
    encoded: str = ""

    @property
    def sizes(self) -> list[list[int]]:
        """The buckets: those named, or those of `sides`."""
        return [bucket for side in self.sides for bucket in area_buckets(side)] or self.buckets

    @property
    def parts(self) -> list[PartRecipe]:
        """The mixture, every part named; a single source is a mixture of one."""
        one = PartRecipe(source=self.source, options=self.options, filters=self.filters, repeats=self.repeats)
        return [
            dataclasses.replace(
                p, name=p.name or p.source, tasks=p.tasks or self.tasks,
                hold_out=p.hold_out if p.hold_out >= 0 else self.hold_out,
                captions=self.captions if p.captions == CaptionsRecipe() else p.captions,
            )
            for p in self.mixture or [one]
        ]  # fmt: skip

    def check(self) -> None:
        must(0 <= self.text_dropout <= 1, "data.text_dropout", "be in [0, 1]", self.text_dropout)
        must(0 <= self.hold_out < 1, "data.hold_out", "be in [0, 1)", self.hold_out)
        must(bool(self.sizes), "data.buckets", "name at least one [height, width]", self.buckets)
        for bucket in self.buckets:
            ok = len(bucket) == 2 and all(side > 0 and side % 16 == 0 for side in bucket)
            must(ok, "data.buckets", "hold [height, width] in multiples of 16 pixels", bucket)
        for side in self.sides:
            must(side >= 32 and side % 16 == 0, "data.sides", "be multiples of 16 pixels from 32 on", side)
        default = DataRecipe.__dataclass_fields__["buckets"].default_factory()  # type: ignore[misc]
        must(not self.sides or self.buckets in ([], default), "data.buckets", "be [] where there are data.sides",
             self.buckets)  # fmt: skip
        must(0 <= self.mask_floor < 1, "data.mask_floor", "be in [0, 1)", self.mask_floor)
        must(not (self.cache and self.encoded), "data.encoded", "be empty where there is data.cache", self.encoded)
        must(not (self.mixture and self.cache), "data.cache", "be empty where there is a mixture", self.cache)
        names = [part.name for part in self.parts]
        must(len(set(names)) == len(names), "data.mixture", "have parts of different names", names)
        _check_weights("data.mixture", {part.name: part.weight for part in self.parts})
        must(not (self.mixture and self.repeats), "data.repeats", "stand in the parts of a mixture", self.repeats)
        streams: dict[str, PartRecipe] = {}
        for part in self.parts:
            first = streams.setdefault(part_key(part), part)
            alike = (part.tasks, part.keep, part.loss_weight) == (first.tasks, first.keep, first.loss_weight)
            must(alike, "data.mixture", "have the same tasks, keep and loss_weight in parts that take the same samples",
                 [first.name, part.name])  # fmt: skip
            part.captions.check()
            must(part.loss_weight > 0, "data.mixture.loss_weight", "be above 0", part.loss_weight)
            must(part.hold_out < 1, "data.mixture.hold_out", "be below 1", part.hold_out)
            for folder, count in part.repeats.items():
                must_be_at_least(1, f"data.repeats.{folder}", count)
            for task in part.tasks:
                must(task in TASKS, "data.tasks", f"be of {', '.join(TASKS)}", task)
            _check_weights("data.tasks", part.tasks)


def part_key(part: PartRecipe) -> str:
    """Says which stream of samples a part is: its source and what it takes of it."""
    captions = dataclasses.asdict(part.captions)
    taken = [part.source, part.options, part.filters, captions, part.repeats, part.hold_out]
    return json.dumps(taken, sort_keys=True)


def _check_weights(name: str, weights: dict[str, float]) -> None:
    ok = sum(weights.values()) > 0 and min(weights.values()) >= 0
    must(ok, name, "have weights of at least 0, one above 0", weights)


def area_buckets(side: int) -> list[list[int]]:
    """[height, width] in multiples of 16 pixels of about side x side pixels, for each of `RATIOS`."""
    rounded = [[max(16, round(side * root / 16) * 16) for root in (r**-0.5, r**0.5)] for r in RATIOS]
    return list(map(list, dict.fromkeys(map(tuple, rounded))))
