"""Pools of processes that end with the process that began them, however that one ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def worker_pool(workers: int, start: Callable[..., None] | None = None, *given: Any) -> ProcessPoolExecutor:
    """A pool of `workers` processes, in each of which `start(*given)` is called first.

    Spawned: a fork of a process in which torch has started threads can wait for ever. Workers of the library's pool
    wait for tasks for ever when who gives them was killed, as they hold both ends of the pipe.
    """
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (start, given))


def _begin(start: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*given)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a task is not waited for: nobody takes what it makes
