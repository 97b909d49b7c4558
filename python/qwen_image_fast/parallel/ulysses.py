"""Ulysses sequence parallel (arXiv 2309.14509) on packed batches.

Each rank holds an equal part of the packed image rows and of the packed text rows, and computes everything but
attention on them. Before attention an all-to-all trades rows for heads: a rank then has all rows of heads / cp heads;
after it, back. Both streams are split: a text stream on every rank would be computed cp times, and its queries, keys
and values would need a way of their own. Rotary tables are those of the whole sequence, cut to the rank's rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwen_image_fast.models.packing import PackedLayout


def part(rows: int, rank: int, ranks: int) -> slice:
    """The rows of rank `rank`; parts differ by at most one row."""
    return slice(rows * rank // ranks, rows * (rank + 1) // ranks)


class _Trade(torch.autograd.Function):
    """all_to_all_single along the first dimension: sent[i] rows go to rank i, got[i] come from it."""

    @staticmethod
    def forward(ctx, x, sent, got, group):
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return _trade(x, sent, got, group)

    @staticmethod
    def backward(ctx, grad):
        return _trade(grad, ctx.got, ctx.sent, ctx.group), None, None, None


def _trade(x: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
    out = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), got, sent, group=group)
    return out


@dataclass(frozen=True)
class SplitLayout(PackedLayout):
    """A rank's rows of a layout: offsets and rotary tables are of its rows, shapes and lengths of the whole samples.

    Attributes:
        whole: the layout of all ranks' rows. group, rank: of the split.
        img_rows, txt_rows: rows of each rank. img_parts, txt_parts: this rank's rows of each sample.
        order: place in the whole joint sequence of each row, as the ranks send them. back: its inverse.
    """

    whole: PackedLayout | None = None
    group: Any = None
    rank: int = 0
    img_rows: tuple[int, ...] = ()
    txt_rows: tuple[int, ...] = ()
    img_parts: tuple[int, ...] = ()
    txt_parts: tuple[int, ...] = ()
    order: Tensor | None = None
    back: Tensor | None = None

    def attend_apart(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        pieces = self.attend(q, k, v).split([n for pair in zip(self.txt_parts, self.img_parts) for n in pair])
        return list(pieces[1::2]), list(pieces[0::2])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, images_only: bool = False) -> Tensor:
        """Attention over whole samples; q, k, v and the result are of this rank's rows and all heads."""
        whole = self.whole
        assert whole is not None and self.order is not None and self.back is not None
        joint = tuple(i + t for i, t in zip(self.img_rows, self.txt_rows))
        if not images_only:
            q, k, v = (t[self.back] for t in self._to_heads(joint, q, k, v))
            return self._to_rows(joint, whole.attend(q, k, v)[self.order])
        # The last block: image queries alone, whose order is that of the whole image stream.
        k, v = (t[self.back] for t in self._to_heads(joint, k, v))
        (q,) = self._to_heads(self.img_rows, q)
        return self._to_rows(self.img_rows, whole.attend(q, k, v, images_only=True))

    def _to_heads(self, rows: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ranks, n = len(rows), rows[self.rank]
        cut = torch.stack([t.unflatten(1, (ranks, -1)) for t in tensors], 2)  # rows, ranks, tensors, heads, head_dim
        sent = cut.transpose(0, 1).flatten(0, 1)
        return _Trade.apply(sent, [n] * ranks, list(rows), self.group).unbind(1)

    def _to_rows(self, rows: tuple[int, ...], y: Tensor) -> Tensor:
        ranks, n = len(rows), rows[self.rank]
        got = _Trade.apply(y, list(rows), [n] * ranks, self.group)
        return got.unflatten(0, (ranks, n)).transpose(0, 1).flatten(1, 2)


def split_layout(layout: PackedLayout, rank: int, ranks: int, group: Any) -> tuple[SplitLayout, slice, slice]:
    """The layout of one of `ranks` parts of `layout`, which has no `targets`; and its image and text rows."""
    device = layout.cu_img.device
    cu_img, cu_txt = layout.cu_img.tolist(), layout.cu_txt.tolist()
    img = [part(cu_img[-1], r, ranks) for r in range(ranks)]
    txt = [part(cu_txt[-1], r, ranks) for r in range(ranks)]
    order: list[int] = []
    for r in range(ranks):
        for s in range(layout.samples):
            start = cu_img[s] + cu_txt[s]  # of the sample in the joint sequence
            first, last = _inside(cu_txt, s, txt[r])
            order += range(start + first - cu_txt[s], start + last - cu_txt[s])
            start += cu_txt[s + 1] - cu_txt[s]
            first, last = _inside(cu_img, s, img[r])
            order += range(start + first - cu_img[s], start + last - cu_img[s])
    places = torch.tensor(order)
    own_img, own_txt = img[rank], txt[rank]

    def offsets(cu: Tensor, own: slice) -> Tensor:
        return (cu - own.start).clamp(0, own.stop - own.start)

    shared = {f.name: getattr(layout, f.name) for f in fields(PackedLayout)}
    own_layout = SplitLayout(
        **shared | {
            "cu_img": offsets(layout.cu_img, own_img),
            "cu_txt": offsets(layout.cu_txt, own_txt),
            "segments": offsets(layout.segments, own_img),
            "img_rope": layout.img_rope[own_img].contiguous(),
            "txt_rope": layout.txt_rope[own_txt].contiguous(),
        },
        whole=layout,
        group=group,
        rank=rank,
        img_rows=tuple(s.stop - s.start for s in img),
        txt_rows=tuple(s.stop - s.start for s in txt),
        img_parts=_lengths(cu_img, own_img),
        txt_parts=_lengths(cu_txt, own_txt),
        order=places.to(device),
        back=places.argsort().to(device),
    )  # fmt: skip
    return own_layout, own_img, own_txt


def _inside(cu: list[int], sample: int, rows: slice) -> tuple[int, int]:
    """First and last row of a sample within `rows`."""
    first = max(cu[sample], rows.start)
    return first, max(min(cu[sample + 1], rows.stop), first)


def _lengths(cu: list[int], rows: slice) -> tuple[int, ...]:
    return tuple(last - first for first, last in (_inside(cu, s, rows) for s in range(len(cu) - 1)))
