"""The engine in a process of its own: the event loop never waits for it, and it may crash and come back."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from qwen_image_fast.serving.followers import Lines, Place, begin_process, follow
from qwen_image_fast.serving.messages import Alive, Event, Ready, Task
from qwen_image_fast.serving.settings import Model

STOP = "stop"


class EngineProcess:
    """`on_event` is called from a thread of this process; `on_end` once, with the exit code, when the engine's ended.

    `run`: what the process does with the model and its end of the connection.
    """

    def __init__(
        self,
        model: Model,
        on_event: Callable[[Event], None],
        on_end: Callable[[int | None], None],
        run: Callable[[Model, Connection], None] | None = None,
    ):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        pipes = [(context.Pipe(), context.Pipe()) for _ in range(1, model.split.ranks)]
        ends = [(Lines(*ours), Lines(*given)) for ours, given in (zip(*pair) for pair in pipes)]
        arguments: list[Any] = [model, theirs]
        if pipes:
            self._folder = tempfile.TemporaryDirectory(prefix="qwen-image-fast-")
            places = [Place(rank, model.split, f"{self._folder.name}/group") for rank in range(model.split.ranks)]
            arguments += [[ours for ours, _ in ends], places[0]]
        self._process = context.Process(target=run or serve, args=arguments, name="engine", daemon=True)
        self._all = [self._process]
        for (_, given), place in zip(ends, places[1:] if pipes else []):
            self._all.append(context.Process(target=follow, args=(model, place, given), name="follower", daemon=True))
        for process in self._all:
            process.start()
        for connection in (theirs, *(end for pair in ends for lines in pair for end in lines)):
            connection.close()
        if pipes:
            threading.Thread(target=self._watch, daemon=True).start()
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._on_event, self._on_end = on_event, on_end
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def submit(self, task: Task) -> None:
        self._outgoing.put(task)

    def cancel(self, id: str, reason: str) -> None:
        self._outgoing.put((id, reason))

    def end(self, seconds: float = 5.0) -> None:
        """Ask it to end, and make it where it does not."""
        self._outgoing.put(STOP)
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        for process in reversed(self._all):
            process.kill()

    def _watch(self) -> None:
        """No process of a group goes on without another: the rest would wait for it in a collective operation."""
        multiprocessing.connection.wait([process.sentinel for process in self._all])
        self.kill()

    def _read(self) -> None:
        try:
            while True:
                self._on_event(self._connection.recv())
        except (EOFError, OSError):
            pass
        self._outgoing.put(STOP)
        self._process.join()
        self._on_end(self._process.exitcode)

    def _write(self) -> None:
        while (message := self._outgoing.get()) is not None:
            try:
                self._connection.send(message)
            except (OSError, ValueError):
                return
            if message == STOP:
                return


def serve(model: Model, connection: Connection, others: Sequence[Lines] = (), place: Place | None = None) -> None:
    """The engine's process: loads the model, makes a picture, says so, and works until it is told to stop or its parent
    is gone. others, place: the processes that compute with it."""
    begin_process()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def send() -> None:
        while True:
            try:
                connection.send(events.get())
            except OSError:
                os._exit(1)

    threading.Thread(target=send, daemon=True).start()
    from qwen_image_fast.serving.loading import load

    engine, about = load(model, events.put, others, place)
    events.put(Ready(about))

    def live() -> None:
        while engine.is_alive:
            events.put(Alive(_memory(model.device), *engine.load, engine.rate))
            time.sleep(1)
        os._exit(1)  # what failed is on standard error; the parent answers the requests and starts another engine

    threading.Thread(target=live, daemon=True).start()
    try:
        while (message := connection.recv()) != STOP:
            if isinstance(message, Task):
                engine.submit(message)
            else:
                engine.cancel(*message)
    except EOFError:
        pass
    os._exit(0)  # what runs is nobody's any more


def _memory(device: str) -> dict[str, int]:
    """Bytes of this process, and of its GPU."""
    with open("/proc/self/statm") as file:
        found = {"host": int(file.read().split()[1]) * resource.getpagesize()}
    torch = sys.modules["torch"]
    if device.startswith("cuda"):
        found["allocated"] = torch.cuda.memory_allocated(device)
        found["reserved"] = torch.cuda.memory_reserved(device)
    return found
