"""Numpy's BLAS in processes that do not multiply matrices for a living."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from qwen_image_fast.extras import needed_for


def on_one_thread(purpose: str) -> AbstractContextManager[Any]:
    """From the call on, or until the end of a `with`, numpy multiplies matrices on one thread.

    OpenBLAS's threads wait for more work by spinning: where a small matrix is multiplied now and then, they take all
    processors and do nothing with them.

    Args:
        purpose: what for, in the sentence of where `threadpoolctl` is missing.
    """
    with needed_for(purpose):
        from threadpoolctl import threadpool_limits
    limits: AbstractContextManager[Any] = threadpool_limits(1, "blas")
    return limits
