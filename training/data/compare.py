"""Verdicts that need all records: duplicates among those that every filter let pass, then the balance of what is left.

Names, hashes and sizes of such records are in memory; the table of the balance is on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_image_fast.extras import needed_for

from .filters.balance import Balance
from .filters.duplicates import LARGEST_DISTANCE, best_of, leaders, near_pairs
from .filters.order import DUPLICATES
from .recipe import FilterRecipe

with needed_for("filtering a data set"):
    import pyarrow as pa
    import pyarrow.compute as pc

# Beyond the limit, so that the report can show what passes next to it.
_MARGIN = 2
_PART = 4096

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Fate:
    """Of a record that every filter let pass. exact, near: scores; filter, reason: None where it stays."""

    exact: float | None = None
    near: float | None = None
    filter: str | None = None
    reason: str | None = None


@dataclass
class Survivors:
    """What is compared, arrays of one length in order of the records.

    Attributes:
        number: of the record. key: its sha256, as 32 bytes. pixels, bytes: what makes the better one of two copies.
        quality: what makes the better one of a node. hash, hashed: the perceptual hash, and whether there is one.
        names: id, origin, category and node.
    """

    number: np.ndarray
    key: np.ndarray
    pixels: np.ndarray
    bytes: np.ndarray
    quality: np.ndarray
    hash: np.ndarray
    hashed: np.ndarray
    names: pa.Table

    def __len__(self) -> int:
        return len(self.number)

    def rank(self) -> np.ndarray:
        """int64: the place of each from the best to the worst copy: by pixels, then by bytes of the file, of which
        encoding again and blur leave fewer, then by order."""
        rank = np.empty(len(self), np.int64)
        rank[np.lexsort((self.number, -self.bytes, -self.pixels))] = np.arange(len(self))
        return rank


def compares(recipe: FilterRecipe) -> bool:
    """Whether any record's fate depends on others; else `Fate()` is that of all."""
    return not {*DUPLICATES} <= {*recipe.without} or any(_balances(recipe))


def _balances(recipe: FilterRecipe) -> tuple[bool, bool]:
    """Whether categories are thinned, and nodes."""
    balance = recipe.balance
    by_category = 6 in recipe.stages and "category_balance" not in recipe.without and bool(balance.categories)
    return by_category, 7 in recipe.stages and "taxonomy" not in recipe.without and balance.power < 1


def columns(recipe: FilterRecipe) -> list[str]:
    """Of `read_survivors`."""
    return ["id", "origin", "category", "node", "kept", "height", "width", "bytes", "hash", recipe.balance.best_by]


def read_survivors(tables: Iterable[pa.Table], best_by: str) -> Survivors:
    """The records that are kept in tables of `audit.ROWS`, which follow each other in the order of the records."""
    arrays: dict[str, list[np.ndarray]] = {
        name: [] for name in ("number", "key", "pixels", "bytes", "quality", "hash", "hashed")
    }
    names, count = [], 0
    for table in tables:
        kept = table.column("kept").to_numpy()
        table, numbers = table.filter(table.column("kept")), np.flatnonzero(kept) + count
        count += len(kept)
        arrays["number"].append(numbers)
        arrays["key"].append(np.array([bytes.fromhex(one) for one in table.column("id").to_pylist()], "S32"))
        height, width = (_filled(table, name, 0, np.int64) for name in ("height", "width"))
        arrays["pixels"].append(height * width)
        arrays["bytes"].append(_filled(table, "bytes", 0, np.int64))
        arrays["quality"].append(_filled(table, best_by, -math.inf, np.float64))
        arrays["hash"].append(_filled(table, "hash", 0, np.uint64))
        arrays["hashed"].append(table.column("hash").is_valid().to_numpy())
        names.append(table.select(["id", "origin", "category", "node"]))
    joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
    return Survivors(**joined, names=pa.concat_tables(names).combine_chunks())


def _filled(table: pa.Table, name: str, value: float, kind: type) -> np.ndarray:
    return pc.fill_null(table.column(name), pa.scalar(value, table.column(name).type)).to_numpy().astype(kind)


def local_groups(keys: np.ndarray) -> np.ndarray:
    """int64: the number of the group of equal keys that each belongs to."""
    return np.unique(keys, return_inverse=True)[1]


def compare(
    found: Survivors,
    recipe: FilterRecipe,
    folder: Path,
    *,
    groups: Callable[[np.ndarray], np.ndarray] = local_groups,
    pairs: Callable[[np.ndarray, int], Iterator[Pairs]] = near_pairs,
) -> Iterator[Fate]:
    """The fate of each survivor, in order.

    Of the same bytes, and of pictures whose hashes are within `curation.duplicate_bits`, the best stays, see
    `Survivors.rank`. The balance sees what is left.

    Args:
        folder: for the balance's table.
        groups, pairs: how equal keys and near hashes are found; `engine_ray` finds the same on a cluster.
    """
    count, rank = len(found), found.rank()
    copy_of, like, bits = np.arange(count), np.full(count, -1), np.full(count, -1, np.int16)
    exact, near = ("exact_duplicate" not in recipe.without), ("near_duplicate" not in recipe.without)
    if exact:
        copy_of = best_of(groups(found.key), rank)
    single = copy_of == np.arange(count)
    if near:
        which = np.flatnonzero(single & found.hashed)
        like[which], bits[which] = _alike(found.hash[which], rank[which], recipe.curation.duplicate_bits, pairs)
        like[which] = np.where(like[which] < 0, -1, which[like[which]])
    balance = _balanced(found, recipe, np.flatnonzero(single & (like < 0)), folder)
    next_gone = next(balance, None)
    origins = found.names.column("origin")
    for place in range(count):
        scores = (float(not single[place]) if exact else None, float(bits[place]) if bits[place] >= 0 else None)
        if not single[place]:
            yield Fate(*scores, "exact_duplicate", f"the file is the same as {origins[int(copy_of[place])]}")
        elif like[place] >= 0:
            what = f"it looks like {origins[int(like[place])]}: {bits[place]} of 64 bits differ"
            yield Fate(*scores, "near_duplicate", what)
        elif next_gone is not None and next_gone[0] == place:
            yield Fate(*scores, *next_gone[1:])
            next_gone = next(balance, None)
        else:
            yield Fate(*scores)


def _alike(
    hashes: np.ndarray, rank: np.ndarray, distance: int, pairs: Callable[[np.ndarray, int], Iterator[Pairs]]
) -> tuple[np.ndarray, np.ndarray]:
    """As `leaders`, of records: those of one hash stand and fall with the best of them."""
    if not len(hashes):
        return np.empty(0, np.int64), np.empty(0, np.int16)
    different, group = np.unique(hashes, return_inverse=True)
    best = best_of(group, rank)
    best_of_hash = np.empty(len(different), np.int64)
    best_of_hash[group] = best
    nothing = np.empty(0, np.int64)
    parts = list(pairs(different, min(distance + _MARGIN, LARGEST_DISTANCE)))
    joined = tuple(np.concatenate([part[n] for part in parts] or [nothing]) for n in range(3))
    goes_for, nearest = leaders(rank[best_of_hash], joined, distance)  # type: ignore[arg-type]
    gone = goes_for[group] >= 0
    like = np.where(gone, best_of_hash[goes_for[group]], best)
    like[~gone & (best == np.arange(len(hashes)))] = -1
    bits = nearest[group].copy()
    bits[~gone & (best != np.arange(len(hashes)))] = 0
    return like, bits


def _balanced(found: Survivors, recipe: FilterRecipe, left: np.ndarray, folder: Path) -> Iterator[tuple[int, str, str]]:
    """(place among the survivors, filter, reason) of what the balance of stages 6 and 7 takes, in order."""
    balance, (by_category, by_node) = recipe.balance, _balances(recipe)
    if not (by_category or by_node):
        return
    table = Balance(folder, balance.categories, balance.tail, balance.power, recipe.seed)

    def known() -> Iterator[tuple[int, str, str, str, str, float | None]]:
        for start in range(0, len(left), _PART):
            places = left[start : start + _PART]
            names, quality = found.names.take(places).to_pylist(), found.quality[places].tolist()
            for place, one, value in zip(places.tolist(), names, quality):
                known_value = None if math.isinf(value) else value
                yield place, one["id"], one["origin"], one["category"], one["node"], known_value

    table.add(known())
    yield from table.reasons(by_category, by_node)
