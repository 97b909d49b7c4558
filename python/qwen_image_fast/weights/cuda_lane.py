"""Buffers on a GPU, filled by copies from pinned memory on a stream of their own. Not yet run on a GPU.

Events order the copies with the computation, and neither waits for the other on the host: a copy into a buffer waits
for the event behind the last kernel that used it, a block's first kernel for the event behind its copy. Only a thread
that reads from the disk waits, for the copy out of the pinned buffer that it is going to fill.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen_image_fast.weights.ring import Slot


class Streams(Protocol):
    """The part of CUDA that is used, so that tests can put another in its place."""

    def new_stream(self) -> Any: ...
    def computing(self) -> Any: ...
    def new_event(self) -> Any: ...
    def on(self, stream: Any) -> AbstractContextManager: ...
    def copy(self, to: Tensor, source: Tensor) -> None: ...
    def empty(self, nbytes: int) -> Tensor: ...
    def pinned(self, nbytes: int) -> Tensor: ...


class CudaStreams:
    """torch's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def computing(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def new_event(self) -> Any:
        return torch.cuda.Event()

    def on(self, stream: Any) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> Tensor:
        return pin(self, torch.empty(nbytes, dtype=torch.uint8, device="cpu"))


def pin(owner: Any, memory: Tensor) -> Tensor:
    """The same memory, from which a GPU copies by itself as long as `owner` lives, which keeps it.

    torch's own pinned memory comes in powers of two.
    """
    runtime: Any = torch.cuda.cudart()
    error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error):
        raise RuntimeError(f"memory_limit: {memory.nbytes / 1e9:.1f} GB of memory could not be pinned ({error})")
    weakref.finalize(owner, lambda: runtime.cudaHostUnregister(memory.data_ptr()))
    return memory


@dataclass
class Events:
    sent: Any
    used: Any


class CudaLane:
    """Copies to the GPU beside the computation."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.stream = streams.new_stream()

    def buffer(self, nbytes: int) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode(False):
            return self.streams.empty(nbytes), self.streams.pinned(nbytes)

    def _events(self, slot: Slot) -> Events:
        if slot.state is None:
            slot.state = Events(self.streams.new_event(), self.streams.new_event())
        return slot.state

    def may_fill(self, slot: Slot) -> None:
        self._events(slot).sent.synchronize()  # an event that was never recorded is over

    def send(self, slot: Slot, filled: Tensor) -> None:
        events = self._events(slot)
        with self.streams.on(self.stream):
            self.stream.wait_event(events.used)
            self.streams.copy(slot.buffer[: len(filled)], filled)
            events.sent.record(self.stream)

    def arrive(self, slot: Slot) -> None:
        self.streams.computing().wait_event(self._events(slot).sent)

    def release(self, slot: Slot) -> None:
        self._events(slot).used.record(self.streams.computing())
