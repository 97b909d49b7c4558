"""Work of the text stream beside that of the image, on a CUDA stream of its own.

A prompt has so few rows that its products wait for their weights, while the image's leave memory alone and, in their
last wave of tiles, some of the processors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwen_image_fast.ops._library import watched

T = TypeVar("T")
U = TypeVar("U")


def both(main: Callable[[], T], beside: Callable[[], U], on: Tensor) -> tuple[T, U]:
    """The results of the two. Where `on` is on CUDA and nothing is recorded for gradients, `beside` runs on a stream of
    its own, which begins behind all that was queued before and has ended for all that is queued after.

    Memory needs no care in the functions, but what `beside` reads of its caller's must outlive the call: the allocator
    would give it to `main` otherwise. What either makes is used and freed behind the other's end, and a stream's memory
    goes back to that stream, whose next use begins behind the last of the other.
    """
    if not on.is_cuda or torch.is_grad_enabled() or watched():
        return main(), beside()
    current = torch.cuda.current_stream(on.device)
    side = _side_stream(on.device, current.cuda_stream)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        second = beside()
    first = main()
    current.wait_stream(side)
    return first, second


@functools.cache
def _side_stream(device: torch.device, current: int) -> Any:
    """One for each stream that work is queued in, so that two threads do not wait for each other. Always the same one:
    a CUDA graph that was captured there keeps its workspaces."""
    return torch.cuda.Stream(device)
