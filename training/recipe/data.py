"""What a run learns from: sources, mixtures, sizes, tasks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from qwen_image_fast.training.recipe.fields import must

TASKS = ("t2i", "ti2i", "recon")
DRAWN = ("squares", "synthesis")  # sources that draw their pictures


@dataclass
class PartRecipe:
    """A part of a mixture. weight: its share of the samples, of all parts' weights. source, options, filters: as in
    `DataRecipe`. tasks: its own; empty: those of the mixture. name: in `mixture.yaml`; empty: the source.
    """

    name: str = ""
    weight: float = 1.0
    source: str = "squares"
    options: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataRecipe:
    """source: "squares" (a toy), "synthesis" (training.synthesis), shards that `data filter` wrote (the folder with
    index.parquet), or a folder of images with captions in `<name>.txt`.

    options: arguments of the source. mixture: several sources, instead of one. filters: fields of the recipe of
    `data filter` (`training/data/recipe.py`); what pictures of shards and folders must pass while the run goes on.
    buckets: allowed [height, width] in pixels; an image goes to the one of the nearest aspect ratio. tasks: weights of
    t2i (text to image), ti2i (references and an instruction) and recon (the reference is the image). text_dropout:
    share of samples whose caption becomes "". cache: folder of latents made by
    `training.batches.latents`; empty: encode on the fly.
    """

    source: str = "squares"
    options: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    mixture: list[PartRecipe] = field(default_factory=list)
    buckets: list[list[int]] = field(default_factory=lambda: [[64, 64]])
    tasks: dict[str, float] = field(default_factory=lambda: {"t2i": 1.0})
    text_dropout: float = 0.1
    cache: str = ""

    @property
    def parts(self) -> list[PartRecipe]:
        """The mixture, every part named; a single source is a mixture of one."""
        one = PartRecipe(source=self.source, options=self.options, filters=self.filters)
        parts = self.mixture or [one]
        return [dataclasses.replace(p, name=p.name or p.source, tasks=p.tasks or self.tasks) for p in parts]

    def check(self) -> None:
        must(0 <= self.text_dropout <= 1, "data.text_dropout", "be in [0, 1]", self.text_dropout)
        must(bool(self.buckets), "data.buckets", "name at least one [height, width]", self.buckets)
        for bucket in self.buckets:
            ok = len(bucket) == 2 and all(side > 0 and side % 16 == 0 for side in bucket)
            must(ok, "data.buckets", "hold [height, width] in multiples of 16 pixels", bucket)
        must(not (self.mixture and self.cache), "data.cache", "be empty where there is a mixture", self.cache)
        names = [part.name for part in self.parts]
        must(len(set(names)) == len(names), "data.mixture", "have parts of different names", names)
        _check_weights("data.mixture", {part.name: part.weight for part in self.parts})
        for part in self.parts:
            for task in part.tasks:
                must(task in TASKS, "data.tasks", f"be of {', '.join(TASKS)}", task)
            _check_weights("data.tasks", part.tasks)


def part_key(part: PartRecipe) -> str:
    """Says which stream of samples a part is: its source and what it takes of it."""
    return json.dumps([part.source, part.options, part.filters], sort_keys=True)


def _check_weights(name: str, weights: dict[str, float]) -> None:
    ok = sum(weights.values()) > 0 and min(weights.values()) >= 0
    must(ok, name, "have weights of at least 0, one above 0", weights)
