"""Tensor parallel, head-wise (Qwen-Image report, arXiv 2508.02324, section 4.1; Megatron-LM, arXiv 1909.08053).

Queries, keys and values of both streams are split by whole heads over their outputs, so that norm, rotation and
attention of a head stay on one rank; `to_out` and `to_add_out` are split over their inputs; the MLP likewise. Forward,
each stream of a block has two all-reduces (after attention, after the MLP), backward two (before them). Modulation,
norms and embeddings are on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from qwen_image_fast.training.parallel.layout import local


class _Spread(torch.autograd.Function):
    """x for every rank's heads; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum of all ranks' x, in place; every rank's x gets the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Spread:
    """`Spread(group)(x)`: see `_Spread`. `run_block` asks attention for one, once for q, k and v."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, x: Tensor) -> Tensor:
        return _Spread.apply(x, self.group)


class ColumnLinear(nn.Linear):
    """A linear layer of which each rank computes some outputs. spread: None where the input was spread before."""

    spread: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.spread is None else self.spread(x)
        return F.linear(x, local(self.weight), local(self.bias))


class RowLinear(nn.Linear):
    """A linear layer of which each rank has some inputs; the bias is added to the sum."""

    group: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return _Sum.apply(F.linear(x, local(self.weight)), self.group) + self.bias


def parallelize(transformer: Any, mesh: DeviceMesh) -> None:
    """Split the blocks of a transformer on the meta device over the one-dimensional `mesh`."""
    group = mesh.get_group()
    for block in transformer.transformer_blocks:
        attn = block.attn
        attn.spread = Spread(group)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            _column(getattr(attn, name), mesh)
        for mlp in (block.img_mlp, block.txt_mlp):
            _column(mlp.net[0].proj, mesh, Spread(group))
            _row(mlp.net[2], mesh)
        _row(attn.to_out[0], mesh)
        _row(attn.to_add_out, mesh)


def _column(layer: nn.Linear, mesh: DeviceMesh, spread: Spread | None = None) -> None:
    layer.__class__ = ColumnLinear
    layer.spread = spread  # type: ignore[assignment]
    layer.weight, layer.bias = _part(layer.weight, mesh, 0), _part(layer.bias, mesh, 0)


def _row(layer: nn.Linear, mesh: DeviceMesh) -> None:
    layer.__class__ = RowLinear
    layer.group = mesh.get_group()  # type: ignore[assignment]
    layer.weight = _part(layer.weight, mesh, 1)


def _part(p: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """`p`, on the meta device, with this rank's equal part of dimension `dim`."""
    shape = list(p.shape)
    shape[dim] //= mesh.size()
    part = torch.empty(shape, dtype=p.dtype, device="meta")
    split = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False, shape=p.shape, stride=p.stride())
    return nn.Parameter(split, requires_grad=p.requires_grad)
