"""What an adapter adds to a layer, by kind, and how active ones become tensors that a forward pass reads.

A change D of a weight W [out, in], always times the adapter's scale, which is alpha / rank:

- Pair, LoRA (arXiv 2106.09685): D = B A.
- Hadamard, LoHa (arXiv 2108.06098; as in LyCORIS, arXiv 2309.14859): D = (W1a W1b) * (W2a W2b), elementwise.
- Kronecker, LoKr (arXiv 2309.14859): D = W1 (x) W2, each whole or a product of two matrices.
- Difference: D itself, as `.diff` of LyCORIS and of extracted adapters.

DoRA (arXiv 2402.09353) gives a pair, or any of them, a magnitude m for each row (or each column) of the weight:
W + D becomes m (W + D) / |W + D|, whose norms are those of rows (columns). Its change is that less W, so that a weight
of 0.5 goes half the way; PEFT scales D inside of the norm instead, which is the same at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pair(NamedTuple):
    """down: A, [rank, in]; up: B, [out, rank]."""

    down: Tensor
    up: Tensor

    def matrix(self, device: torch.device) -> Tensor:
        return _product((self.up, self.down), device)


class Hadamard(NamedTuple):
    """first, second: pairs (B, A) of [out, rank] and [rank, in]."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]

    def matrix(self, device: torch.device) -> Tensor:
        return _product(self.first, device) * _product(self.second, device)

    def pair(self, device: torch.device) -> Pair | None:
        """The same matrix as a pair of rank r1 r2, of products of columns and of rows; None where that is larger."""
        (up, down), (up2, down2) = ([t.to(device, torch.float32) for t in side] for side in (self.first, self.second))
        if len(down) * len(down2) * (len(up) + down.shape[1]) > len(up) * down.shape[1]:
            return None
        ups, downs = up[:, :, None] * up2[:, None], down[:, None] * down2[None]
        return Pair(downs.flatten(0, 1), ups.flatten(1))


class Kronecker(NamedTuple):
    """first: [a, b], second: [c, d] with a c = out, b d = in; each a tuple of one matrix, or of two to multiply."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]

    def matrix(self, device: torch.device) -> Tensor:
        return torch.kron(*self.factors(device))

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _product(self.first, device), _product(self.second, device)


class Difference(NamedTuple):
    """weight: as the layer's own."""

    weight: Tensor

    def matrix(self, device: torch.device) -> Tensor:
        return _product((self.weight,), device)


class Adapter(NamedTuple):
    """What an adapter does to one layer; at least a change or a bias.

    scale: of the change, alpha / rank. magnitude: of DoRA, [out, 1] or [1, in]. bias: added to the layer's, [out].
    """

    change: Pair | Hadamard | Kronecker | Difference | None
    scale: float = 1.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def delta(self, weight: Tensor, factor: Tensor | None = None) -> Tensor:
        """What is added to `weight`, in float32; `factor` as `rescaling` gives it."""
        assert self.change is not None
        delta = self.change.matrix(weight.device) * self.scale
        if factor is None:
            return delta
        return delta * factor + weight.float() * (factor - 1)

    def rescaling(self, weight: Tensor) -> Tensor | None:
        """DoRA's m / |W + D|, float32, of the magnitude's shape; None without a magnitude."""
        if self.magnitude is None:
            return None
        changed = weight.float() + self.delta(weight)
        norm = changed.norm(dim=1 if self.magnitude.shape[1] == 1 else 0, keepdim=True)
        return self.magnitude.to(norm) / norm.clamp_min(torch.finfo(torch.float32).tiny)


def _product(matrices: tuple[Tensor, ...], device: torch.device) -> Tensor:
    """One matrix, or the product of two, in float32."""
    first, *rest = (m.to(device, torch.float32) for m in matrices)
    return first @ rest[0] if rest else first


# What a layer's active adapters come to, of the weight's type, None where there is nothing of it:
# A's side by side and B's with all factors; a whole change; DoRA's factors less 1 by row and by column; a bias; then
# the factors of each Kronecker product, two by two.
Mix = tuple[Tensor | None, ...]


def adapted(x: Tensor, product: Callable[[Tensor, Tensor | None], Tensor], bias: Tensor | None, mix: Mix) -> Tensor:
    """(W + sum_i w_i D_i) x + b + sum_i w_i b_i, where `product` gives W x + b of x and b."""
    down, up, whole, rows, columns, more_bias, *kronecker = mix
    if rows is None:
        y = product(x, bias)
    else:
        y = product(x, None)
        y = torch.addcmul(y, y, rows)
        y = y if bias is None else y + bias
    if columns is not None:
        y = y + product(x * columns, None)
    if down is not None and up is not None:
        y = y + F.linear(F.linear(x, down), up)
    if whole is not None:
        y = y + F.linear(x, whole)
    for first, second in zip(kronecker[::2], kronecker[1::2]):
        assert first is not None and second is not None
        y = y + (first @ F.linear(x.unflatten(-1, (first.shape[1], second.shape[1])), second)).flatten(-2)
    return y if more_bias is None else y + more_bias


def mixed(active: Iterable[tuple[Adapter, float]], weight: Tensor) -> Mix:
    """The mix of adapters with their weights on a layer's `weight`.

    A Kronecker product stays one, which takes less time than a matrix and far less memory, unless it has a magnitude.
    Then, as does a Hadamard product of a high rank, it becomes a whole matrix.
    """
    downs, ups, kronecker = [], [], []
    sums: list[Tensor | None] = [None] * 4  # whole, rows, columns, bias

    def add(place: int, tensor: Tensor) -> None:
        now = sums[place]
        sums[place] = tensor if now is None else now + tensor

    for adapter, share in active:
        if adapter.bias is not None:
            add(3, adapter.bias.to(weight.device, torch.float32) * share)
        if adapter.change is None:
            continue
        change, scale, factor = adapter.change, adapter.scale * share, adapter.rescaling(weight)
        by_row = factor is not None and factor.shape[1] == 1
        if isinstance(change, Hadamard):
            change = change.pair(weight.device) or change
        if factor is not None:
            add(1 if by_row else 2, (factor.flatten() - 1) * share)
        if isinstance(change, Pair):
            down, up = change
            if factor is not None and by_row:
                up = up.to(factor) * factor
            elif factor is not None:
                down = down.to(factor) * factor
            downs.append(down.to(weight))
            ups.append(up.to(weight) * scale)
        elif isinstance(change, Kronecker) and factor is None:
            first, second = change.factors(weight.device)
            kronecker += [(first * scale).to(weight), second.to(weight)]
        else:
            whole = change.matrix(weight.device) * scale
            add(0, whole if factor is None else whole * factor)
    pair = (torch.cat(downs), torch.cat(ups, dim=1)) if downs else (None, None)
    return (*pair, *(None if t is None else t.to(weight.dtype) for t in sums), *kronecker)
