"""Where the weights of a streamed unit come from: files, or memory of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qwen_image_fast.tensor_files import Entry, read_into
from qwen_image_fast.weights.memory import same_file
from qwen_image_fast.weights.reading import CHUNK, decode_weight
from qwen_image_fast.weights.ring import Kind, Layout
from qwen_image_fast.weights.stored import JoinedWeight, Weight, is_floating

PIECE = 16 << 20  # bytes that one thread reads at a time, so that all of them end together


class FileSource:
    """Weights of any format, read from their files, floating-point ones as `dtype`; None: as stored, or bfloat16.

    A file that is replaced or written to is an error when it is read next: two states of a model would be mixed.
    """

    ready: Tensor | None = None

    def __init__(self, weights: Mapping[str, Weight], dtype: torch.dtype | None) -> None:
        self.weights = dict(weights)
        self.layout = Layout({name: kind_of(weight, dtype) for name, weight in weights.items()})
        self.nbytes = sum(weight.nbytes for weight in weights.values())
        self.files = {path: same_file(path) for weight in weights.values() for path in files_of(weight)}

    def reads(self, views: Mapping[str, Tensor]) -> list[Callable[[], None]]:
        work: list[Callable[[], None]] = []
        for name, weight in self.weights.items():
            out = views[name]
            if not isinstance(weight, Entry):
                work.append(partial(self._decode, name, weight, out))
                continue
            flat, step = out.view(-1), PIECE // weight.dtype.itemsize
            for first in range(0, flat.numel(), step):
                work.append(partial(self._read, weight, first, flat[first : first + step]))
        return work

    def _decode(self, name: str, weight: Weight, out: Tensor) -> None:
        self._check(weight)
        decode_weight(name, weight, out)
        self._check(weight)

    def _read(self, entry: Entry, first: int, out: Tensor) -> None:
        """Values of a plain tensor from the given one on."""
        size = entry.dtype.itemsize
        self._check(entry)
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start + first * size)
            if out.dtype == entry.dtype:
                read_into(file, out)
            else:
                for part in out.split(CHUNK):
                    stored = torch.empty(part.shape, dtype=entry.dtype, device="cpu")
                    read_into(file, stored)
                    part.copy_(stored)
        self._check(entry)

    def _check(self, weight: Weight) -> None:
        for path in files_of(weight):
            try:
                same = same_file(path) == self.files[path]
            except FileNotFoundError:
                same = False
            if not same:
                raise OSError(f"{path} was replaced or changed while its weights are streamed; load the model again")


class MemorySource:
    """Weights that lie in memory as they would in a buffer; `owner` keeps it, pinned for a GPU."""

    def __init__(self, memory: Tensor, layout: Layout) -> None:
        self.ready: Tensor | None = memory
        self.layout, self.nbytes = layout, memory.nbytes

    def reads(self, views: Mapping[str, Tensor]) -> list[Callable[[], None]]:
        return []


class TensorSource:
    """Tensors of somebody else, which may be pages of a file: copied by the threads that read."""

    ready: Tensor | None = None

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.layout = Layout({name: Kind(tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def reads(self, views: Mapping[str, Tensor]) -> list[Callable[[], None]]:
        return [partial(_copy, views[name], tensor.detach()) for name, tensor in self.tensors.items()]


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


def kind_of(weight: Weight, dtype: torch.dtype | None) -> Kind:
    """What a weight becomes when it is read as `dtype`."""
    if isinstance(weight, Entry):
        kept = dtype is None or not weight.dtype.is_floating_point
        return Kind(weight.dtype if kept or dtype is None else dtype, torch.Size(weight.shape))
    if not is_floating(weight):
        raise ValueError(f"a weight of the kind {weight.kind} cannot be streamed")
    return Kind(dtype or torch.bfloat16, torch.Size(weight.shape))


def files_of(weight: Weight) -> set[Path]:
    if isinstance(weight, Entry):
        return {weight.path}
    if isinstance(weight, JoinedWeight):
        return {path for piece in weight.pieces for path in files_of(piece)}
    return {part.entry.path for part in weight.parts.values()}
