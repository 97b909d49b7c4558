"""Read weights of any format as floating-point tensors: plain ones as they are, the others decoded in parts.

Besides the result, a reader holds the stored bytes and the decoded values of `CHUNK` values, and whole only what
belongs to all rows of a weight, such as a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from qwen_image_fast.tensor_files import READERS, Entry, read_into, read_tensors
from qwen_image_fast.weights.stored import JoinedWeight, Part, StoredWeight, Weight

CHUNK = 1 << 18  # values decoded together: with what decoding needs besides, a few MB


def read_weights(
    weights: Mapping[str, Weight], dtype: torch.dtype | None, device: torch.device, mapped: bool = False
) -> dict[str, Tensor]:
    """The weights on `device`, floating-point ones as `dtype`; None: plain tensors as stored, the others bfloat16.

    `mapped`: large ones that are neither converted nor moved are pages of their files (tensor_files.py).

    Raises:
        ValueError: a quantised weight is not finite.
        OSError: a file became shorter.
    """
    plain = {name: weight for name, weight in weights.items() if isinstance(weight, Entry)}
    tensors = read_tensors(plain, dtype, device, mapped)
    with ThreadPoolExecutor(READERS) as pool:
        reads = []
        for name, weight in weights.items():
            if not isinstance(weight, Entry):
                with torch.inference_mode(False):  # the threads are not in inference mode and could not write
                    tensors[name] = torch.empty(weight.shape, dtype=dtype or torch.bfloat16, device=device)
                reads.append(pool.submit(decode_weight, name, weight, tensors[name]))
        for read in reads:
            read.result()
    return {name: tensors[name] for name in weights}


def read_entry(entry: Entry) -> Tensor:
    """One stored tensor, whole, on the host."""
    return _read_rows(Part(entry, 1), 0, entry.shape[0] if entry.shape else 1).view(entry.shape)


def decode_weight(name: str, weight: Weight, out: Tensor) -> None:
    """Fill `out`, contiguous and of the weight's shape, with a weight that is not a plain tensor."""
    if isinstance(weight, StoredWeight):
        decode_into(name, weight, out)
        return
    assert isinstance(weight, JoinedWeight)
    start = 0
    for piece in weight.pieces:
        size = 1 if weight.stacked else piece.shape[weight.axis]
        place = out.narrow(weight.axis, start, size)
        start += size
        value = torch.empty(piece.shape, dtype=out.dtype, device=out.device)
        if isinstance(piece, StoredWeight):
            decode_into(name, piece, value)
        else:
            value.copy_(read_entry(piece))
        place.copy_(value.view(place.shape))


def decode_into(name: str, weight: StoredWeight, out: Tensor) -> None:
    """Fill `out`, contiguous and of the weight's shape, with its values in the dtype of `out`."""
    flat = out.view(-1)
    whole = {role: read_entry(part.entry).to(out.device) for role, part in weight.parts.items() if not part.rows}
    step = max(1, CHUNK // (weight.width * weight.step)) * weight.step
    for first in range(0, weight.rows, step):
        count = min(step, weight.rows - first)
        rows = {role: _read_rows(part, first, count).to(out.device) for role, part in weight.parts.items() if part.rows}
        values = weight.decode({**whole, **rows}, first, out.dtype)
        if not is_finite(values):
            path: Path = weight.parts["weight"].entry.path
            raise ValueError(
                f"{name} in {path} ({weight.kind}) is not finite in {out.dtype}: its scales are damaged, download or "
                "convert the file again" + ("; or too large for it, try bfloat16" if out.dtype == torch.float16 else "")
            )
        flat[first * weight.width : (first + count) * weight.width].copy_(values.reshape(-1))


def is_finite(values: Tensor) -> bool:
    """Whether all are. What is not finite makes the sum so, which is ten times as fast to know."""
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(torch.isfinite(values).all())


def _read_rows(part: Part, first: int, count: int) -> Tensor:
    """What goes with `count` rows of the weight from `first` on, which is a multiple of `part.rows`."""
    entry = part.entry
    start, end = first // part.rows, -(-(first + count) // part.rows)
    out = torch.empty((end - start, *entry.shape[1:]), dtype=entry.dtype, device="cpu")
    if out.numel():
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start + start * (out.nbytes // len(out)))
            read_into(file, out)
    return out
