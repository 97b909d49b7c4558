"""Synthesis aimed at rare characters: from how often each occurs in a data set to the weights of a recipe.

The report resamples texts for the long tail of their characters (arXiv 2508.02324, section 3.2); its weights are not
printed, ours are (most / count)^power.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_image_fast.extras import needed_for

from .words import is_han

_BATCH = 4096


def count_characters(texts: Iterable[str]) -> dict[str, int]:
    """How often each Chinese character occurs, the most frequent first."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(character for character in text if is_han(character))
    return dict(counts.most_common())


def rare_recipe(
    counts: Mapping[str, int], *, power: float = 0.5, limit: float = 50.0, rarest: int = 1000
) -> dict[str, Any]:
    """Fields of a `SynthesisRecipe` of the rarest characters: one drawn (most / count)^power times as often as the
    most frequent of the table, and at most `limit` times; of a count of 0, `limit` times.

    Raises:
        ValueError: an entry is no Chinese character or has no count of 0 or more; a number is out of its limits.
    """
    for character, count in counts.items():
        fine = isinstance(character, str) and len(character) == 1 and is_han(character)
        if not fine or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"characters: the table must give Chinese characters a count each, got "
                             f"{character!r}: {count!r}")  # fmt: skip
    for name, value, holds in (
        ("power", power, 0 < power <= 1), ("limit", limit, 1 <= limit < float("inf")), ("rarest", rarest, rarest >= 1),
    ):  # fmt: skip
        if not holds:
            raise ValueError(f"characters: {name} must be in range (power 0 to 1, the others at least 1), got {value}")
    if not counts:
        raise ValueError("characters: there must be a Chinese character, got none")
    most = max(1, max(counts.values()))
    chosen = sorted(counts, key=lambda character: (counts[character], character))[:rarest]
    weights = {one: min(limit, (most / counts[one]) ** power) if counts[one] else limit for one in chosen}
    return {
        "languages": ["zh"], "random_strings": 1.0, "paragraph": 0.0, "han": "".join(chosen),
        "han_weights": {character: round(weight, 4) for character, weight in weights.items()},
    }  # fmt: skip


def read_counts(path: str | Path) -> dict[str, int]:
    """A JSON table of counts, or those of the captions in shards, of which `path` is the folder.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        try:
            counts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"characters: {path} is not JSON: {error}") from error
        if not isinstance(counts, dict):
            raise ValueError(f"characters: {path} must be an object of counts by character")
        return counts
    index = path / "index.parquet"
    if not index.is_file():
        raise ValueError(f"characters: {path} must be a .json table or a folder of shards, it has no index.parquet")
    with needed_for("counting characters"):
        import pyarrow.parquet as pq

    with pq.ParquetFile(index) as table:
        batches = table.iter_batches(batch_size=_BATCH, columns=["caption"])
        return count_characters(text or "" for batch in batches for text in batch.column(0).to_pylist())
