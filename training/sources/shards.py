"""Shards that `data filter` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_image_fast.training.data.screen import Screen
from qwen_image_fast.training.data.shard_index import ShardIndex
from qwen_image_fast.training.randomness import epoch_position, generator
from qwen_image_fast.training.sources.sample import Sample


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
