"""CPU tensors whose ops run the kernels that nvcc made of the CUDA sources, interpreted."""

from __future__ import annotations

from typing import Any

import torch
from emulator.device import extent
from torch import Tensor

from qwen_image_fast.ops import _library

ALLOCATORS = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]


class InterpretedDevice:
    """While entered, ops on CPU tensors launch the interpreted kernels of `module`.

    A kernel may touch the tensors whose addresses its op asked for, and its scratch memory. What comes from
    `torch.empty` counts as not written until a kernel has had it.
    """

    def __init__(self, module: Any, ptx: dict[str, str]):
        """`ptx`: by the names of sources."""
        self.module, self.ptx = module, ptx
        self.tensors: list[Tensor] = []
        self.fresh: dict[int, Tensor] = {}

    def use(self, **changed: str) -> None:
        """Run the PTX that nvcc made, but for some sources another."""
        self.module.set_programs(list((self.ptx | changed).values()))

    def __enter__(self) -> InterpretedDevice:
        self.use()
        self.module.be()
        self.replaced = [(owner, name, getattr(owner, name)) for owner, name in ALLOCATORS]
        self.replaced += [(_library, "launch", _library.launch), (_library, "on_cuda", _library.on_cuda)]
        self.replaced += [(Tensor, "data_ptr", Tensor.data_ptr)]
        self.address = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            self.tensors.append(tensor)
            return self.address(tensor)

        def unwritten(allocate):
            def allocated(*args, **kwargs):
                made = allocate(*args, **kwargs)
                self.fresh[self.address(made)] = made
                return made

            return allocated

        for owner, name, function in self.replaced[: len(ALLOCATORS)]:
            setattr(owner, name, unwritten(function))
        Tensor.data_ptr = data_ptr
        _library.launch, _library.on_cuda = self.launch, lambda x: True
        return self

    def __exit__(self, *_) -> None:
        for owner, name, function in self.replaced:
            setattr(owner, name, function)
        self.tensors.clear()
        self.fresh.clear()

    def launch(self, name: str, on: Tensor, *args, scratch: tuple | None = None) -> None:
        if on.dtype == torch.float64:
            raise TypeError(f"{name} must not get float64 tensors on CUDA")
        memory = torch.empty(0, dtype=torch.uint8)
        if scratch is not None:
            memory = torch.empty(getattr(self.module, f"{name}_scratch")(*scratch), dtype=torch.uint8)
        touched = {self.address(t): t for t in (*self.tensors, memory)}
        self.module.set_ranges([(*extent(t, a), a not in self.fresh) for a, t in touched.items()])
        for a in touched:
            self.fresh.pop(a, None)
        self.tensors.clear()
        getattr(self.module, f"{name}_cuda")(*args, self.address(memory), 0)
