"""Stages 6 and 7, balance: decisions that need all records, taken from a table on disk after the other filters.

Stage 6 thins categories to the recipe's shares. Stage 7 thins the crowded nodes of the taxonomy to their best records
and leaves nodes of the tail whole.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


class Balance:
    """Collects what is known of each kept record, then says which of them go.

    Args:
        folder: for the table, on disk.
        shares: target share of each category; only categories that occur count, and records of others all stay.
        tail, power: a node of n records keeps n up to `tail`, else round(tail (n / tail)^power).
        seed: of the choice among the records of a category, which is a function of (seed, id) alone.
    """

    def __init__(self, folder: Path, shares: Mapping[str, float], tail: int, power: float, seed: int):
        self._shares, self._tail, self._power, self._seed = dict(shares), tail, power, seed
        path = folder / "balance.sqlite"
        self._table = sqlite3.connect(path, isolation_level=None)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute(
            "CREATE TABLE kept (number INTEGER PRIMARY KEY, category TEXT, node TEXT, quality REAL, draw REAL)"
        )

    def add(self, records: Iterable[tuple[int, str, str, str, str, float | None]]) -> None:
        """Note kept records: number, id, origin, category, node, quality; the better it is, the longer a record stays
        in a crowded node."""

        def rows() -> Iterator[tuple[int, str, str, float, float]]:
            for number, key, origin, category, node, quality in records:
                digest = hashlib.sha256(f"{self._seed}:{key}:{origin}".encode()).digest()
                draw = int.from_bytes(digest[:6], "big") / 2**48
                # A plain REAL column would sort a missing quality first.
                yield number, category, node, -1e300 if quality is None else quality, draw

        self._table.executemany("INSERT INTO kept VALUES (?, ?, ?, ?, ?)", rows())

    def reasons(self, by_category: bool, by_node: bool) -> Iterator[tuple[int, str, str]]:
        """(number, filter, reason) of each record that goes, in order of the numbers."""
        chances = self._chances() if by_category else {}
        self._table.create_function("chance", 1, lambda category: chances.get(category, 1.0), deterministic=True)
        query = """
            SELECT kept.number, kept.category, kept.node, kept.draw < chance(kept.category), place, count
            FROM kept LEFT JOIN (
              SELECT number, ROW_NUMBER() OVER (PARTITION BY node ORDER BY quality DESC, draw, number) AS place,
                     COUNT(*) OVER (PARTITION BY node) AS count
              FROM kept WHERE draw < chance(category)
            ) AS ranked ON kept.number = ranked.number ORDER BY kept.number"""
        for number, category, node, chosen, place, count in self._table.execute(query):
            if not chosen:
                share = chances[category]
                yield number, "category_balance", f"{category} is above its share: {share:.3f} of its records are kept"
            elif by_node and place > (keeps := self._keeps(count)):
                what = f"{node or 'its node'} has {count} records and keeps its best {keeps}; this is {place}"
                yield number, "taxonomy", what

    def _chances(self) -> dict[str, float]:
        counts = dict(self._table.execute("SELECT category, COUNT(*) FROM kept GROUP BY category"))
        present = {name: share for name, share in self._shares.items() if counts.get(name)}
        if not present:
            return {}
        total = min(counts[name] / share for name, share in present.items())
        return {name: share * total / counts[name] for name, share in present.items()}

    def _keeps(self, count: int) -> int:
        return count if count <= self._tail else round(self._tail * (count / self._tail) ** self._power)
