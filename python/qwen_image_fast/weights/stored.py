"""A weight as a file stores it: which tensors make it, and how they become numbers, a few rows at a time.

A format is a module with a function that finds such weights among the tensors of a file (`gguf_file`, `comfy`,
`bitsandbytes`, `nunchaku`). Whoever wants the stored numbers rather than floats, to compute with them, takes `parts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_image_fast.tensor_files import Entry


class Part(NamedTuple):
    """One stored tensor of a weight; `rows` of the weight go with each of its own rows, 0: all of it with every row.

    shared: another weight has it too, and counts its bytes.
    """

    entry: Entry
    rows: int = 0
    shared: bool = False


# The parts of the rows from the given one on, and the dtype wanted: [rows, width] of that dtype.
Decode = Callable[[Mapping[str, Tensor], int, torch.dtype], Tensor]


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight, decoded by rows of `width` values. `parts["weight"]` holds the numbers.

    rotation: of int8 numbers with a scale for a row, or one for all, the size of the groups that are rotated, or 1.
    rotation_of_4: the same of 4-bit codes of a codebook in groups of 16.
    """

    kind: str
    shape: tuple[int, ...]
    width: int
    parts: Mapping[str, Part]
    decode: Decode
    rotation: int | None = None
    rotation_of_4: int | None = None

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.width

    @property
    def step(self) -> int:
        """Rows that cannot be decoded apart from each other."""
        return max(part.rows for part in self.parts.values())

    @property
    def nbytes(self) -> int:
        return sum(part.entry.nbytes for part in self.parts.values() if not part.shared)


@dataclass(frozen=True)
class JoinedWeight:
    """Weights that a file keeps apart and the model has as one: joined along `axis`, or stacked on a new one."""

    pieces: tuple[Entry | StoredWeight, ...]
    axis: int
    stacked: bool = False

    @property
    def kind(self) -> str:
        return self.pieces[0].kind

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        if self.stacked:
            return (*first[: self.axis], len(self.pieces), *first[self.axis :])
        along = sum(piece.shape[self.axis] for piece in self.pieces)
        return (*first[: self.axis], along, *first[self.axis + 1 :])

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices], for a table of one axis and small unsigned indices; faster than indexing on a CPU."""
    return torch.index_select(table, 0, indices.reshape(-1).int()).view(indices.shape)


Weight = Entry | StoredWeight | JoinedWeight


def is_floating(weight: Weight) -> bool:
    """Whether it becomes floating-point numbers."""
    if isinstance(weight, JoinedWeight):
        return is_floating(weight.pieces[0])
    return isinstance(weight, StoredWeight) or weight.dtype.is_floating_point


def is_quantised(weight: Weight) -> bool:
    """Whether it has to be decoded: everything but plain tensors."""
    if isinstance(weight, JoinedWeight):
        return any(is_quantised(piece) for piece in weight.pieces)
    return isinstance(weight, StoredWeight)
