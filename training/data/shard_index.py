"""Records of shards by their number: what the trainer reads at random."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.extras import needed_for
from qwen_image_fast.training.recipe.fields import RecipeError

from .record import Record, record_of

INDEX = "index.parquet"
_BATCH = 4096


class ShardIndex:
    """The chosen records of shards; 12 bytes of memory for each.

    Args:
        folder: with `index.parquet`, as `write_shards` leaves it.
        where, least, most: see `training.sources.shards.Shards`.

    Raises:
        RecipeError: the index is damaged or lacks offsets, or no record is chosen. ImportError: there is no pyarrow.
    """

    def __init__(
        self,
        folder: str | Path,
        where: Mapping[str, Sequence[str]],
        least: Mapping[str, float],
        most: Mapping[str, float],
    ):
        with needed_for(f"reading the shards of {folder}"):
            import pyarrow as pa
            import pyarrow.parquet as pq

        self.folder = Path(folder)
        self.shards: list[str] = []
        numbers, offsets = [], []
        try:
            with pq.ParquetFile(self.folder / INDEX) as table:
                if "offset" not in table.schema_arrow.names:
                    raise RecipeError(f"recipe: {self.folder / INDEX} has no offsets: write its shards again")
                names: dict[str, int] = {}
                for batch in table.iter_batches(batch_size=_BATCH):
                    for row in batch.to_pylist():
                        if _chosen(row, where, least, most):
                            numbers.append(names.setdefault(row["shard"], len(names)))
                            offsets.append(row["offset"])
                self.shards = list(names)
        except (pa.ArrowInvalid, OSError) as error:
            raise RecipeError(f"recipe: {self.folder / INDEX} is damaged: write its shards again ({error})") from error
        if not numbers:
            raise RecipeError(f"recipe: no record of {self.folder} is chosen by where {dict(where)}, "
                              f"least {dict(least)} and most {dict(most)}")  # fmt: skip
        self.number, self.offset = np.array(numbers, np.int32), np.array(offsets, np.int64)

    def __len__(self) -> int:
        return len(self.number)

    def read(self, place: int) -> Record:
        """Record `place` of those chosen; what cannot be read becomes its fault."""
        shard = self.folder / self.shards[self.number[place]]
        origin = f"{shard.name}@{self.offset[place]}"
        parts: dict[str, bytes] = {}
        try:
            with open(shard, "rb") as file:
                file.seek(int(self.offset[place]))
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    key = None
                    for member in tar:
                        stem, _, suffix = member.name.partition(".")
                        if (key := key or stem) != stem:
                            break
                        content = tar.extractfile(member)
                        parts[suffix] = content.read() if content else b""
                        if "txt" in parts:
                            break
            if missing := sorted({"json", "txt"} - parts.keys()):
                raise ValueError(f"its {missing[0]} is missing")
            described = json.loads(parts.pop("json"))
            if not isinstance(described, dict):
                raise ValueError(f"its JSON must be an object, got {type(described).__name__}")
            parts.pop("txt")
            (image,) = parts.values()
        except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, RecursionError) as error:
            return Record(b"", origin=origin, fault=f"the shard {shard.name} is damaged here: {error}")
        record = record_of(image, described, str(described.get("origin") or origin), {})
        if record.id != described.get("id"):
            return Record(b"", origin=record.origin, fault=f"the shard {shard.name} is damaged here: another sha256")
        return record


def _chosen(
    row: Mapping[str, Any], where: Mapping[str, Sequence[str]], least: Mapping[str, float], most: Mapping[str, float]
) -> bool:
    if not (where or least or most):
        return True
    values = {**json.loads(row["metadata"]), **row}
    return (
        all(values.get(name) in allowed for name, allowed in where.items())
        and all(_number(values.get(name)) >= limit for name, limit in least.items())
        and all(_number(values.get(name)) <= limit for name, limit in most.items())
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
