"""The order in which requests begin: fair among tenants and priorities, short ones first, and nobody starves."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
PRIORITIES = (-4, 4)  # each is worth twice the share of the one below


def weight(priority: int) -> float:
    """The share of a priority beside 0."""
    return 2.0 ** max(PRIORITIES[0], min(PRIORITIES[1], priority))


@dataclass
class _Flow(Generic[T]):
    """What one tenant asks for at one priority; served: the work that was begun, over its weight."""

    served: float = 0.0
    items: list[tuple[float, int, float, T]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Waiting requests by (priority, tenant).

    Among those that have any waiting, the one begins that was served least, by work over weight; one that comes back
    after a pause has no credit of that time. Within it, the request that would have been done first had it begun when
    it came: short ones overtake long ones, but no later one overtakes a request that has waited as long as it takes.
    """

    def __init__(self) -> None:
        self._flows: dict[tuple[int, str], _Flow[T]] = {}
        self._behind: dict[tuple[int, str], float] = {}  # what flows without a request were served beyond the others
        self._served = 0.0
        self._number = itertools.count()

    def __len__(self) -> int:
        return sum(len(flow.items) for flow in self._flows.values())

    def __iter__(self) -> Iterator[T]:
        """In the order of each flow."""
        for flow in self._flows.values():
            yield from (item for *_, item in sorted(flow.items, key=lambda entry: entry[:2]))

    def push(self, item: T, *, now: float, seconds: float, cost: float, priority: int = 0, tenant: str = "") -> None:
        """`now`: a clock in seconds. `seconds`: how long it takes, about; `cost`: of the machine, in any unit."""
        key = (priority, tenant)
        if key not in self._flows:
            self._flows[key] = _Flow(max(self._served, self._behind.pop(key, 0.0)))
        heapq.heappush(self._flows[key].items, (now + seconds, next(self._number), cost, item))

    def pop(self, fits: Callable[[T], bool] = lambda item: True) -> T | None:
        """The next that fits; None where none does."""
        for key, flow in sorted(self._flows.items(), key=lambda entry: (entry[1].served, -entry[0][0])):
            for entry in sorted(flow.items, key=lambda entry: entry[:2]):
                *_, cost, item = entry
                if fits(item):
                    flow.items.remove(entry)
                    heapq.heapify(flow.items)
                    self._served = max(self._served, flow.served)
                    flow.served += cost / weight(key[0])
                    self._forget_empty()
                    return item
        return None

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out all that are unwanted."""
        found = []
        for flow in self._flows.values():
            found += [entry[-1] for entry in flow.items if unwanted(entry[-1])]
            flow.items = [entry for entry in flow.items if not unwanted(entry[-1])]
            heapq.heapify(flow.items)
        self._forget_empty()
        return found

    def _forget_empty(self) -> None:
        empty = {key: flow.served for key, flow in self._flows.items() if not flow.items}
        self._flows = {key: flow for key, flow in self._flows.items() if flow.items}
        kept = {**self._behind, **empty}
        self._behind = {key: served for key, served in kept.items() if served > self._served and self._flows}
