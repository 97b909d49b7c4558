"""Who makes batches, behind one interface: a maker of batches, tickets for them, a backend that fills tickets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_image_fast.training.recipe.curriculum import Change

MOST_DEATHS = 3  # of producers over one batch


class BatchMaker(Protocol):
    """Makes batches; it is copied to producers, so what it loads it loads where it is used."""

    def batch(self, step: int, micro: int) -> Any:
        """Micro-batch `micro` of step `step`, on the CPU: always the same one."""

    def use(self, changes: Sequence[Change]) -> None:
        """Follow changes of the mixture from now on."""


@dataclass(frozen=True)
class Ticket:
    """An order for one micro-batch."""

    number: int
    step: int
    micro: int
    changes: tuple[Change, ...] = ()


def make(maker: BatchMaker, ticket: Ticket) -> Any:
    if ticket.changes:
        maker.use(ticket.changes)
    return maker.batch(ticket.step, ticket.micro)


class Backend(Protocol):
    """Where batches are made."""

    def submit(self, ticket: Ticket) -> None:
        """Have it made, soon."""

    def result(self, number: int) -> Any:
        """The batch of a submitted ticket; waits for it. Raises what making it raised, or `ProducerDied`."""

    def close(self) -> None: ...


class ProducerDied(RuntimeError):
    """Producers died over one batch again and again."""


class Here:
    """The process that trains makes each batch when it needs it: the simple reference."""

    def __init__(self, maker: BatchMaker):
        self.maker = maker
        self.tickets: dict[int, Ticket] = {}

    def submit(self, ticket: Ticket) -> None:
        self.tickets[ticket.number] = ticket

    def result(self, number: int) -> Any:
        return make(self.maker, self.tickets.pop(number))

    def close(self) -> None:
        self.tickets.clear()
