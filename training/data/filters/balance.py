"""Stages 6 and 7, balance: decisions that need all records, taken from a table on disk after the other filters.

Stage 6 thins categories to the recipe's shares. Stage 7 thins the crowded nodes of the taxonomy to their best records
and leaves nodes of the tail whole.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..record import Record


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

    def add(self, number: int, record: Record, quality: float | None) -> None:
        """Note kept record `number`; the better its quality, the longer it stays in a crowded node."""
        digest = hashlib.sha256(f"{self._seed}:{record.id}:{record.origin}".encode()).digest()
        draw = int.from_bytes(digest[:6], "big") / 2**48
        node = str(record.metadata.get("node") or record.category)
        # A plain REAL column would sort a missing quality first.
        row = (number, record.category, node, -1e300 if quality is None else quality, draw)
        self._table.execute("INSERT INTO kept VALUES (?, ?, ?, ?, ?)", row)

    def reasons(self, by_category: bool, by_node: bool) -> Iterator[tuple[str, str] | None]:
        """For each record in order of its number: (filter, reason) where it goes, else None."""
        chances = self._chances() if by_category else {}
        self._table.create_function("chance", 1, lambda category: chances.get(category, 1.0), deterministic=True)
        query = """
            SELECT kept.category, kept.node, kept.draw < chance(kept.category), place, count FROM kept LEFT JOIN (
              SELECT number, ROW_NUMBER() OVER (PARTITION BY node ORDER BY quality DESC, draw) AS place,
                     COUNT(*) OVER (PARTITION BY node) AS count
              FROM kept WHERE draw < chance(category)
            ) AS ranked ON kept.number = ranked.number ORDER BY kept.number"""
        for category, node, chosen, place, count in self._table.execute(query):
            if not chosen:
                share = chances[category]
                yield "category_balance", f"{category} is above its share: {share:.3f} of its records are kept"
            elif by_node and place > (keeps := self._keeps(count)):
                yield (
                    "taxonomy",
                    f"{node or 'its node'} has {count} records and keeps its best {keeps}; this is {place}",
                )
            else:
                yield None

    def _chances(self) -> dict[str, float]:
        counts = dict(self._table.execute("SELECT category, COUNT(*) FROM kept GROUP BY category"))
        present = {name: share for name, share in self._shares.items() if counts.get(name)}
        if not present:
            return {}
        total = min(counts[name] / share for name, share in present.items())
        return {name: share * total / counts[name] for name, share in present.items()}

    def _keeps(self, count: int) -> int:
        return count if count <= self._tail else round(self._tail * (count / self._tail) ** self._power)
