"""When each worker of a run on Ray judged what: a small JSON beside the result, which the report draws."""

from __future__ import annotations

import array
import json
from pathlib import Path
from typing import Any

from qwen_image_fast.files import atomic_write

NAME = "timeline.json"
_MOST_SPANS = 400  # of a row: shorter pauses than this part of the whole are not shown


class Timeline:
    """Collects spans; 32 bytes of memory for each."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], int] = {}  # (machine, worker) to its place, in order of their first spans
        self._row, self._records = array.array("q"), array.array("q")
        self._start, self._end = array.array("d"), array.array("d")

    def add(self, machine: str, worker: str, start: float, end: float, records: int) -> None:
        """A worker's span in seconds of the clock. machine: "" for what is no machine's."""
        self._row.append(self._rows.setdefault((machine, worker), len(self._rows)))
        self._records.append(records)
        self._start.append(start)
        self._end.append(end)

    def rows(self) -> list[dict[str, Any]]:
        """`name` and `spans` of each worker, spans as [start, end, records] in seconds since the first; none: []."""
        if not self._row:
            return []
        began, shortest = min(self._start), (max(self._end) - min(self._start)) / _MOST_SPANS
        machines = {machine: n for n, machine in enumerate(dict.fromkeys(m for m, _ in self._rows if m), 1)}
        spans: list[list[list[float]]] = [[] for _ in self._rows]
        for place in sorted(range(len(self._row)), key=self._start.__getitem__):
            own, start, end = spans[self._row[place]], self._start[place] - began, self._end[place] - began
            if own and start - own[-1][1] < shortest:
                own[-1][1] = max(own[-1][1], end)
                own[-1][2] += self._records[place]
            else:
                own.append([start, end, self._records[place]])
        found, number = [], 0
        for (machine, worker), some in zip(self._rows, spans):
            number += bool(machine)
            name = f"worker {number}, machine {machines[machine]}" if machine else worker
            found.append({"name": name, "spans": [[round(a, 2), round(b, 2), count] for a, b, count in some]})
        return sorted(found, key=lambda row: not row["name"].startswith("worker "))

    def write(self, folder: Path) -> None:
        """`timeline.json` in a folder; nothing where there are no spans."""
        if rows := self.rows():
            content = json.dumps({"rows": rows}).encode()
            atomic_write(folder / NAME, lambda file: file.write(content))


def read_timeline(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's `timeline.json` that have spans; [] where there is none that can be drawn."""
    try:
        rows = json.loads((folder / NAME).read_text(encoding="utf-8"))["rows"]
        found = [
            {"name": str(row["name"]), "spans": [(float(a), float(b), int(count)) for a, b, count in row["spans"]]}
            for row in rows
        ]
        return [row for row in found if row["spans"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
