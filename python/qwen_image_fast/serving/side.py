"""A thread beside the one that takes the steps: it encodes what begins and decodes what is done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch


class Side:
    """Runs jobs one after another, those that finish something first. Jobs must not raise."""

    def __init__(self) -> None:
        self._first: deque[Callable[[], None]] = deque()
        self._then: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="encode and decode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, job: Callable[[], None], finishes: bool) -> None:
        with self._changed:
            (self._first if finishes else self._then).append(job)
            self._changed.notify()

    def end(self) -> None:
        """After the job that runs now; the others are dropped."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        turn = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._first or self._then)
                if self._ended:
                    return
                # Every fourth turn is of what begins, so that waves do not run dry behind slow decoding.
                turn += 1
                first, then = (self._then, self._first) if turn % 4 == 0 else (self._first, self._then)
                job = (first or then).popleft()
            with torch.inference_mode():
                job()
