"""What the ops run, chosen for the running context: a thread or an asyncio task, and what it calls."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
LINEAR_KERNELS = ("table", "torch", "cutlass", "cutlass large", "cutlass small")


class _PerThread(threading.local):
    def __init__(self, value: Any):  # runs in each thread
        self.value = value


class Choice(Generic[T]):
    """A context variable that torch.compile can follow.

    It cannot trace `ContextVar.get`, but it guards on the attributes of `threading.local`: traced code reads a copy
    kept there. The two differ only where the choice reached a thread otherwise than by `of`: with asyncio, in a task
    that runs while another waits inside of `of`, and in `asyncio.to_thread`.
    """

    def __init__(self, name: str, default: T):
        self._variable: ContextVar[T] = ContextVar(f"qwen_image_fast_{name}", default=default)
        self._traced = _PerThread(default)

    def now(self) -> T:
        if torch.compiler.is_compiling():
            return self._traced.value
        return self._variable.get()

    @contextlib.contextmanager
    def of(self, value: T) -> Iterator[None]:
        before = self.now()
        self._set(value)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, value: T) -> None:
        self._traced.value = value
        if not torch.compiler.is_compiling():
            self._variable.set(value)


_reference: Choice[bool] = Choice("reference", False)
_linear_kernels: Choice[str] = Choice("linear_kernels", "table")


def reference() -> contextlib.AbstractContextManager[None]:
    """Run every op's plain PyTorch reference instead of the compiled kernels, in this thread or asyncio task.

    Threads that are started inside do not inherit it. What was recorded for autograd keeps what it was recorded with:
    gradients of a reference are those of its PyTorch operations, wherever and whenever `backward` is called, and blocks
    that `enable_gradient_checkpointing` computes again are computed as at first. A function that you give to
    `torch.utils.checkpoint` yourself is computed again with the choice of the thread that does it, on CUDA one of
    autograd's, which has none: give it `ops.keeping_choices(function)`. Compiled functions are compiled once for each
    choice.
    """
    return _reference.of(True)


def use_reference() -> bool:
    return _reference.now()


def linear_kernels(choice: str) -> contextlib.AbstractContextManager[None]:
    """Choose the kernels of linear_qkv, linear_gelu and linear_gate_residual, in this thread or asyncio task.

    As with `reference`, threads that are started inside do not inherit it, and compiled functions are compiled once for
    each choice. A CUDA graph keeps the kernels that were chosen when it was made.

    Args:
        choice: "table" is the default: where this package's measurements say so CUTLASS, else torch. "torch".
            "cutlass" for all that is on CUDA in float16 or bfloat16, with tiles by size, or "cutlass large" (128 x 256)
            and "cutlass small" (128 x 128); what these kernels cannot take is an error. Tensors on the CPU always
            use torch's products.
            Float32 layers on CPUs with AMX run in linear_amx unless this is "torch"; their gradients, where `backward`
            is called so.
    """
    if choice not in LINEAR_KERNELS:
        raise ValueError(f"linear_kernels: choice must be one of {', '.join(LINEAR_KERNELS)}, got {choice!r}")
    return _linear_kernels.of(choice)


def chosen_linear_kernels() -> str:
    return _linear_kernels.now()


def keeping_choices(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with the choices of now, whichever thread calls it: autograd has threads of its own for CUDA.

    Traced code needs no such thing, its backward is compiled with its forward.
    """
    if torch.compiler.is_compiling():
        return fn
    as_reference, kernels = use_reference(), chosen_linear_kernels()

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _reference.of(as_reference), _linear_kernels.of(kernels):
            return fn(*args, **kwargs)

    return run
