"""Which requests may share a forward so that each gives the same bits as alone.

All ops of this package do so by their rules. The products are a library's, which may choose another order of summation
for few rows: how many rows it takes until it does not is measured here, on the model's own layers. What has fewer rows
in one of its streams runs by itself. On a GPU nothing is promised, and nothing measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from qwen_image_fast.ops.linear_amx import AVAILABLE, SMALLEST

ROWS = (1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 31, 32, 48, 64)
MANY, LARGE = (130, 700), 2**22
# Layers that see one request at a time: of the text, of the noise levels.
OUTSIDE = re.compile(r"^txt_in$|^time_text_embed\.|^norm_out\.|\.(img|txt)_mod\.")


def enough_rows(model: Any, device: torch.device, dtype: torch.dtype) -> int | None:
    """From how many rows on every product of the model's blocks gives a row the same bits whatever the other rows are.

    With the adapters that are active. None: not even from 64 rows on, or in 16 bit, whose products choose their blocks
    by all rows. 0: the device is no CPU, and nothing is measured.
    """
    if device.type != "cpu":
        return 0
    if dtype != torch.float32:
        return None
    layers: dict[tuple, nn.Linear] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.weight.numel() and not OUTSIDE.search(name):
            mix = tuple(None if t is None else t.shape for t in getattr(layer, "mix", ()))
            layers.setdefault((tuple(layer.weight.shape), layer.bias is None, mix), layer)
    bad = 0
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        for many in MANY if layer.weight.numel() < LARGE else MANY[:1]:
            x = torch.randn(many, layer.in_features, generator=generator)
            whole = layer(x)
            for rows in ROWS:
                for first in (0, 3):
                    if not torch.equal(layer(x[first : first + rows]), whole[first : first + rows]):
                        bad = max(bad, rows)
    return next((rows for rows in ROWS if rows > bad), None)


class Streams(Protocol):
    """What takes part in a forward; rows of both branches together."""

    @property
    def image_rows(self) -> int: ...

    @property
    def text_rows(self) -> int: ...


S = TypeVar("S", bound=Streams)


def groups(members: Sequence[S], enough: int | None, amx: bool) -> list[list[S]]:
    """The forwards in which these may run. `amx`: layers of 384 rows or more use other kernels."""
    found: list[list[S]] = []
    open_groups: dict[tuple[bool, bool], list[S]] = {}
    for member in members:
        rows = member.image_rows, member.text_rows
        if enough is None or min(rows) < enough:
            found.append([member])
            continue
        large = (rows[0] >= SMALLEST, rows[1] >= SMALLEST) if amx else (False, False)
        group = open_groups.get(large)
        if amx and group is not None:
            sums = (sum(m.image_rows for m in group) + rows[0], sum(m.text_rows for m in group) + rows[1])
            if any(total >= SMALLEST and not many for total, many in zip(sums, large)):
                group = None
        if group is None:
            group = open_groups[large] = []
            found.append(group)
        group.append(member)
    return found


def uses_amx(model: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the number of rows decides which kernel computes a layer."""
    if device.type != "cpu" or dtype != torch.float32 or not AVAILABLE:
        return False
    weights: list[Tensor] = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    return any(min(weight.shape) >= SMALLEST for weight in weights if weight.dim() == 2)
