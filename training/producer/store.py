"""The bounded store between producers and the trainer.

The trainer asks for micro-batches by tickets, in the order in which it will use them; a backend makes them in any
order. At most `ahead` tickets are out, made or not, so that producers stop where the trainer is slower. A ticket says
all that a batch depends on: when a producer dies its tickets go to another one, and the batch is the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from qwen_image_fast.training.producer.backend import Backend, BatchMaker, Here, Ticket
from qwen_image_fast.training.recipe.run import ProducersRecipe


def start(recipe: ProducersRecipe, maker: BatchMaker) -> Backend:
    """The backend of a recipe. Raises ImportError where Ray is asked for and not installed."""
    if recipe.backend == "here":
        return Here(maker)
    if recipe.backend == "processes":
        from qwen_image_fast.training.producer.processes import Processes

        return Processes(maker, recipe.count)
    from qwen_image_fast.training.producer.ray_actors import RayActors

    return RayActors(maker, recipe)


class Store:
    """Batches in the order of their tickets.

    Args:
        tickets: read only as far as they are handed out.
        ahead: most tickets that are out while a batch is in use.
    """

    def __init__(self, backend: Backend, tickets: Iterator[Ticket], ahead: int):
        self.backend, self.tickets, self.ahead = backend, tickets, ahead
        self.out: deque[int] = deque()

    def next(self) -> Any:
        self._fill(1)
        made = self.backend.result(self.out.popleft())
        self._fill(self.ahead)
        return made

    def _fill(self, count: int) -> None:
        while len(self.out) < count and (ticket := next(self.tickets, None)) is not None:
            self.backend.submit(ticket)
            self.out.append(ticket.number)
