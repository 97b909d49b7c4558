"""The device `cuda-emulated`: CPU tensors, whose ops run the CUDA launchers on the emulator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from emulator import build
from qwen_image_fast.ops import _library


class EmulatedDevice:
    """While entered, ops on CPU tensors run the CUDA kernels on the emulator.

    A kernel may touch the tensors whose addresses its op asked for, and its scratch memory; anything else is an error.
    """

    def __init__(self, cache: Path):
        self.module = build.load(build.build("_C_emulated", build.MODULE, cache))
        self.tensors: list[Tensor] = []

    def __enter__(self) -> EmulatedDevice:
        self.launch, self.on_cuda, self.data_ptr = _library.launch, _library.on_cuda, Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            self.tensors.append(tensor)
            return self.data_ptr(tensor)

        Tensor.data_ptr = data_ptr
        _library.launch, _library.on_cuda = self._launch, lambda x: True
        return self

    def __exit__(self, *_) -> None:
        _library.launch, _library.on_cuda, Tensor.data_ptr = self.launch, self.on_cuda, self.data_ptr
        self.tensors.clear()

    def _launch(self, name: str, on: Tensor, *args, scratch: tuple | None = None) -> None:
        if on.dtype == torch.float64:
            raise TypeError(f"{name} must not get float64 tensors on CUDA")
        memory = torch.empty(0, dtype=torch.uint8)
        if scratch is not None:
            memory = torch.empty(getattr(self.module, f"{name}_scratch")(*scratch), dtype=torch.uint8)
        self.module.set_ranges([extent(t, self.data_ptr(t)) for t in (*self.tensors, memory)])
        self.tensors.clear()
        getattr(self.module, f"{name}_cuda")(*args, self.data_ptr(memory), 0)


def extent(t: Tensor, address: int) -> tuple[int, int]:
    """Address and bytes from the first to the last element of a strided tensor."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else -1
    return address, (last + 1) * t.element_size()
