"""A forward by several ranks of which one alone has the inputs: it sends them, and the others follow.

What waits for the next forward waits on a pipe, which may take any time, and ends with the leader; tensors go by the
group's broadcast.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.packing import PackedLayout
from qwen_image_fast.parallel.ranks import Call, Ranks

KEPT = 16  # layouts that followers keep; the oldest leaves first, on both sides


class GroupLost(BaseException):
    """The ranks no longer do the same, and no later forward can be right: not an error of one request."""


class Leader:
    """Stands in for `Ranks` in the models of rank 0, whose caller knows nothing of the others.

    Args:
        connections: to the others. state: what a follower's `apply` is given before each forward, such as which LoRAs.
    """

    def __init__(self, ranks: Ranks, connections: Sequence[Connection], state: Callable[[], Any] = lambda: None):
        self.ranks, self._connections, self._state = ranks, connections, state
        self._sent: dict[int, tuple[int, PackedLayout]] = {}
        self._number = 0

    @property
    def rank(self) -> int:
        return 0

    def from_first(self, value: Any) -> Any:
        return value

    def forward(self, transformer: Any, *inputs: Any) -> Tensor:
        """`Ranks.forward`. GroupLost: it failed, here or there."""
        call = Call(*inputs)
        known = self._sent.get(id(call.layout))
        if known is None:
            self._number += 1
            known = self._sent[id(call.layout)] = self._number, call.layout
            _keep(self._sent)
            layout: PackedLayout | None = moved(call.layout, torch.device("cpu"))
        else:
            layout = None
        residuals = [] if call.residuals is None else list(call.residuals)
        tensors = [call.img, call.txt, *call.modulation.img, *call.modulation.txt, call.modulation.final, *residuals]
        shapes = [tuple(t.shape) for t in tensors]
        blocks = len(call.modulation.img)
        try:
            told = pickle.dumps((known[0], layout, self._state(), call.img.dtype, shapes, blocks))
            for connection in self._connections:
                connection.send_bytes(told)
            dist.broadcast(torch.cat([t.flatten() for t in tensors]), 0, group=self.ranks.world)
            return self.ranks.forward(transformer, *call)
        except Exception as error:
            raise GroupLost(f"a forward of {self.ranks.split} failed: {error}") from error


def follow(transformer: Any, ranks: Ranks, connection: Connection, apply: Callable[[Any], None]) -> None:
    """Take part in the leader's forwards until it is gone. apply: see `Leader`."""
    layouts: dict[int, PackedLayout] = {}
    device = transformer.proj_out.weight.device
    while True:
        try:
            number, layout, state, dtype, shapes, blocks = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if layout is not None:
            layouts[number] = moved(layout, device)
            _keep(layouts)
        apply(state)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        dist.broadcast(flat, 0, group=ranks.world)
        img, txt, *rest = (part.view(shape) for part, shape in zip(flat.split(sizes), shapes))
        modulation = Modulation(rest[:blocks], rest[blocks : 2 * blocks], rest[2 * blocks])
        ranks.forward(transformer, img, txt, layouts[number], modulation, rest[2 * blocks + 1 :] or None)


def moved(layout: PackedLayout, device: torch.device) -> PackedLayout:
    values = {f.name: getattr(layout, f.name) for f in fields(PackedLayout)}
    there: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(layout, **there)


def _keep(layouts: dict[int, Any]) -> None:
    while len(layouts) > KEPT:
        layouts.pop(next(iter(layouts)))
