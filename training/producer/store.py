"""The bounded store between producers and the trainer, and the interface of a backend.

The trainer asks for micro-batches by tickets, in the order in which it will use them; a backend makes them in any
order. At most `ahead` tickets are out, made or not, so that producers stop where the trainer is slower. A ticket says
all that a batch depends on: when a producer dies its tickets go to another one, and the batch is the same.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qwen_image_fast.training.batches.mixture import Change
from qwen_image_fast.training.recipe.run import ProducersRecipe

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


def pack(value: Any) -> tuple[bytes, list[memoryview]]:
    """A batch as a head and the bytes of its arrays and tensors, uncopied."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: _reduced}
    pickler.dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def unpack(head: bytes, buffers: Sequence[Any]) -> Any:
    """The batch; its arrays are copies that may be written to."""
    return pickle.loads(head, buffers=[bytearray(buffer) for buffer in buffers])


def _reduced(tensor: torch.Tensor) -> Any:
    # numpy has no bfloat16, and bytes travel in any case.
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return _restored, (flat, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _restored(flat: Any, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(flat).view(getattr(torch, dtype)).view(shape)
