"""A batch as bytes that travel between processes."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch


def pack(value: Any) -> tuple[bytes, list[memoryview]]:
    """A batch as a head and the bytes of its arrays and tensors, uncopied."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: _reduced}
    pickler.dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def unpack(head: bytes, buffers: Sequence[Any]) -> Any:
    """The batch; its arrays are copies that may be written to."""
    return pickle.loads(head, buffers=[bytearray(buffer) for buffer in buffers])


def _reduced(tensor: torch.Tensor) -> Any:
    # numpy has no bfloat16, and bytes travel in any case.
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return _restored, (flat, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _restored(flat: Any, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(flat).view(getattr(torch, dtype)).view(shape)
