"""Weights that do not stay in memory: read ahead into a ring of buffers, in the order in which they are used.

A track is a list of units (the blocks of a model) that are used one after another. Some stay in memory; each of the
others has a source, and while one is used the next ones are read into the other buffers, past the end of the track into
its beginning where the track is used again and again (the steps of a sampling loop). Weights are never written back.
Tracks share a ring: the text encoder's buffers are the transformer's afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qwen_image_fast.tensor_files import READERS

ALIGNMENT = 64  # bytes, as torch's own tensors


class Kind(NamedTuple):
    """What a tensor is without its values."""

    dtype: torch.dtype
    shape: torch.Size


class Layout:
    """Where the tensors of a unit lie in a buffer of `nbytes`."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self.places: dict[str, tuple[int, int, Kind]] = {}
        self.nbytes = 0
        for name, kind in kinds.items():
            size = kind.shape.numel() * kind.dtype.itemsize
            self.places[name] = (self.nbytes, size, kind)
            self.nbytes += -(-size // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer, uint8."""
        return {
            name: buffer[start : start + size].view(kind.dtype).view(kind.shape)
            for name, (start, size, kind) in self.places.items()
        }


class Source(Protocol):
    """Where the weights of a unit come from."""

    layout: Layout
    nbytes: int  # that are read
    ready: Tensor | None  # the unit as it would be in a buffer, where it is in (pinned) memory already

    def reads(self, views: Mapping[str, Tensor]) -> list[Callable[[], None]]:
        """What fills them, for any number of threads."""


class Lane(Protocol):
    """How a buffer that was filled comes to where it is computed with, in what order with the computation."""

    def buffer(self, nbytes: int) -> tuple[Tensor, Tensor | None]:
        """A buffer to compute with, and one to read into, None where that is the same."""

    def may_fill(self, slot: Slot) -> None:
        """Wait until the buffer to read into is no longer copied from. In a reading thread."""

    def send(self, slot: Slot, filled: Tensor) -> None:
        """What was filled to the buffer to compute with, after what computes with that. In any thread."""

    def arrive(self, slot: Slot) -> None:
        """What is computed from now on comes after what was sent."""

    def release(self, slot: Slot) -> None:
        """What was computed so far may have used the buffer, what comes does not."""


class HostLane:
    """Computing with the buffers that are read into."""

    def buffer(self, nbytes: int) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu"), None

    def may_fill(self, slot: Slot) -> None:
        pass

    def send(self, slot: Slot, filled: Tensor) -> None:
        if filled is not slot.buffer:
            slot.buffer[: len(filled)].copy_(filled)

    def arrive(self, slot: Slot) -> None:
        pass

    def release(self, slot: Slot) -> None:
        pass


@dataclass(eq=False)
class Slot:
    """A buffer; `state` is the lane's own. `done`: of each read into it."""

    buffer: Tensor
    staging: Tensor | None
    done: Future | None = None
    state: Any = None


@dataclass
class Rate:
    """What reading took: bytes, the seconds in which something was read, and those in which the computation waited;
    and whether that was said."""

    read: int = 0
    reading: float = 0.0
    waited: float = 0.0
    said: bool = False


class Ring:
    """Buffers that are filled in the order of use.

    Args:
        nbytes: of a buffer. count: buffers, at least 2: one that is computed with and one that is filled.
    """

    def __init__(
        self, nbytes: int, count: int, lane: Lane | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if count < 2:
            raise ValueError(f"Ring: count must be at least 2, got {count}")
        self.nbytes, self.lane, self.clock = nbytes, lane or HostLane(), clock
        self.slots = [Slot(*self.lane.buffer(nbytes)) for _ in range(count)]
        self.rate = Rate()
        self._free = list(self.slots)
        self._holds: dict[tuple[Track, int], Slot] = {}
        self._next: tuple[Track, int] | None = None
        self._read_until = 0.0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._order = ThreadPoolExecutor(1, thread_name_prefix="weights")  # one unit after another

    def __reduce__(self):
        raise TypeError("a model whose weights are streamed cannot be copied or pickled; load it again")

    def enter(self, track: Track, i: int) -> dict[str, Tensor]:
        """The weights of a unit, which hold until `leave`."""
        key = (track, i)
        if key not in self._holds:
            self._start(key)
        slot = self._holds[key]
        assert slot.done is not None
        begin = self.clock()
        try:
            slot.done.result()
        except BaseException:
            self._stop()  # whoever tries again reads again
            raise
        self.rate.waited += self.clock() - begin
        self.lane.arrive(slot)
        source = track.sources[i]
        assert source is not None
        return source.layout.views(slot.buffer)

    def leave(self, track: Track, i: int) -> None:
        """The unit is not used any more; its buffer takes the next one."""
        slot = self._holds.pop((track, i), None)
        if slot is not None:
            self.lane.release(slot)
            self._free.append(slot)
            self._ahead()

    def _stop(self) -> None:
        """Make all buffers free, after what is read into them."""
        for slot in self._holds.values():
            if slot.done is not None:
                slot.done.exception()
            self.lane.release(slot)
        self._holds.clear()
        self._free, self._next = list(self.slots), None

    def _start(self, key: tuple[Track, int]) -> None:
        self._stop()
        self._next = key
        self._ahead()

    def _ahead(self) -> None:
        """Fill the free buffers with what comes next."""
        while self._free and self._next is not None and self._next not in self._holds:
            slot, key = self._free.pop(0), self._next
            track, i = key
            source = track.sources[i]
            assert source is not None
            slot.done = self._order.submit(self._fill, slot, source)
            self._holds[key] = slot
            following = track.after(i)
            self._next = None if following is None else (track, following)

    def _fill(self, slot: Slot, source: Source) -> None:
        if source.ready is not None:
            self.lane.send(slot, source.ready)
            return
        begin = self.clock()
        target = slot.buffer if slot.staging is None else slot.staging
        self.lane.may_fill(slot)
        reads = [self._pool.submit(read) for read in source.reads(source.layout.views(target))]
        for read in reads:
            read.exception()  # all of them end before the buffer may be used for something else
        for read in reads:
            read.result()
        self.rate.read += source.nbytes
        self.rate.reading += self.clock() - begin
        self.lane.send(slot, target)


class Track:
    """Units in the order of their use.

    Args:
        sources: of each unit; None: it stays in memory. again: the first one follows on the last one.
    """

    def __init__(self, ring: Ring, sources: Sequence[Source | None], again: bool) -> None:
        self.ring, self.sources, self.again = ring, list(sources), again
        streamed = [i for i, source in enumerate(self.sources) if source is not None]
        following = [*streamed[1:], streamed[0] if again and len(streamed) > 1 else None] if streamed else []
        self._after = dict(zip(streamed, following))

    def after(self, i: int) -> int | None:
        """The streamed unit that is used next."""
        return self._after[i]
