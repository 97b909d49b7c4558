"""Producers as processes of this machine; batches come through shared memory."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import signal
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch

from qwen_image_fast.training import blas
from qwen_image_fast.training.producer.backend import MOST_DEATHS, BatchMaker, ProducerDied, Ticket, make
from qwen_image_fast.training.producer.pack import pack, unpack


@dataclass
class _Worker:
    process: Any
    pipe: Any
    pending: dict[int, Ticket] = field(default_factory=dict)  # in the order in which it makes them


class Processes:
    """A `Backend`. A worker that dies is started anew, and what it had not delivered is made again.

    Args:
        maker: copied to each worker. count: of workers; each computes on one thread.
    """

    def __init__(self, maker: BatchMaker, count: int):
        self.maker = maker
        self.prefix = f"qif-{os.getpid()}-{secrets.token_hex(3)}"
        self.made: dict[int, tuple[str, Any]] = {}
        self.deaths: dict[int, int] = {}
        self.workers = [self._start() for _ in range(count)]

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.maker, self.prefix), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen when the worker dies
        return _Worker(process, ours)

    def submit(self, ticket: Ticket) -> None:
        worker = min(self.workers, key=lambda w: len(w.pending))
        worker.pending[ticket.number] = ticket
        try:
            worker.pipe.send(ticket)
        except OSError:
            self._replace(worker)

    def result(self, number: int) -> Any:
        while number not in self.made:
            ready = connection.wait([worker.pipe for worker in self.workers])
            for worker in [w for w in self.workers if w.pipe in ready]:
                try:
                    done, kind, value = worker.pipe.recv()
                except (EOFError, OSError):
                    self._replace(worker)
                    continue
                del worker.pending[done]
                self.made[done] = kind, value
        kind, value = self.made.pop(number)
        if kind == "failed":
            raise value
        return _fetch(self._name(number), *value)

    def _replace(self, dead: _Worker) -> None:
        """Start another worker with the tickets of one that died."""
        dead.pipe.close()
        dead.process.join()
        working_on = next(iter(dead.pending), None)
        if working_on is not None:
            self.deaths[working_on] = self.deaths.get(working_on, 0) + 1
            if self.deaths[working_on] == MOST_DEATHS:
                ticket, code = dead.pending[working_on], dead.process.exitcode
                why = f"signal {-code}: out of memory, or killed" if code and code < 0 else f"exit code {code}"
                raise ProducerDied(
                    f"train: {MOST_DEATHS} producers died over micro-batch {ticket.micro} of step {ticket.step} "
                    f"({why}); resume with fewer producers.count or look at its samples"
                )
        for number in dead.pending:
            _remove(self._name(number))
        place = self.workers.index(dead)
        self.workers[place] = self._start()
        tickets = list(dead.pending.values())
        self.workers[place].pending = dict(dead.pending)
        for ticket in tickets:
            self.workers[place].pipe.send(ticket)

    def _name(self, number: int) -> str:
        return f"{self.prefix}-{number}"

    def close(self) -> None:
        for worker in self.workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
            for number in worker.pending:
                _remove(self._name(number))
        for number in self.made:
            _remove(self._name(number))


def _work(pipe: Any, maker: BatchMaker, prefix: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends its workers
    torch.set_num_threads(1)
    blas.on_one_thread("producers.backend processes")
    with contextlib.suppress(EOFError, OSError):  # the trainer is gone
        while True:
            ticket = pipe.recv()
            try:
                answer: tuple[str, Any] = "made", _put(f"{prefix}-{ticket.number}", make(maker, ticket))
            except Exception as error:
                answer = "failed", _sendable(error)
            pipe.send((ticket.number, *answer))


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _put(name: str, value: Any) -> tuple[bytes, list[int]]:
    """Write the arrays of a batch into shared memory; what is left travels through the pipe."""
    head, buffers = pack(value)
    sizes = [buffer.nbytes for buffer in buffers]
    if not sum(sizes):
        return head, sizes
    memory = SharedMemory(name, create=True, size=sum(sizes))
    try:
        if hasattr(os, "posix_fallocate"):
            # Without it a full /dev/shm ends the process by SIGBUS in the middle of the copy.
            os.posix_fallocate(memory._fd, 0, sum(sizes))  # type: ignore[attr-defined]
        start = 0
        for buffer, size in zip(buffers, sizes):
            memory.buf[start : start + size] = buffer
            start += size
    except OSError as error:
        memory.unlink()
        what = f"producers: the shared memory is full, a batch needs {sum(sizes) / 1e6:.0f} MB; lower producers.ahead"
        raise OSError(error.errno, what) from error
    finally:
        memory.close()
    return head, sizes


def _fetch(name: str, head: bytes, sizes: list[int]) -> Any:
    if not sum(sizes):
        return unpack(head, [b""] * len(sizes))
    memory = SharedMemory(name)
    try:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return unpack(head, [bytes(memory.buf[end - size : end]) for end, size in zip(ends, sizes)])
    finally:
        memory.close()
        memory.unlink()


def _remove(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        memory = SharedMemory(name)
        memory.close()
        memory.unlink()
