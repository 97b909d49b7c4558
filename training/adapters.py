"""Adapters on linear layers while they are trained: LoRA, DoRA and LoKr, in the names of tensors that files have.

All start without effect on the layer. With dropout p each of the `rank` parts of a change is left out with that
probability in a micro-batch, and the others count 1 / (1 - p); `draw_kept` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_image_fast.training.parallel.layout import local, part_of
from qwen_image_fast.training.randomness import generator, normal


class AdapterLinear(nn.Module):
    """A linear layer and its adapter, whose tensors are float32 and have `lora_` or `lokr_` in their names.

    Args:
        base: the layer, which stays frozen. scale: of the change. rank: parts that dropout may leave out; 0: none.
    """

    off = False  # nothing but the layer below
    kept: Tensor | None = None  # float32 [rank] of this micro-batch; None: all parts count

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.rank, self.scale = base, rank, scale

    @property
    def weight(self) -> Tensor:
        """Of the base layer: its type and device are asked for from outside."""
        return self.base.weight

    def _matrix(self, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(rows, columns, device=self.base.weight.device, dtype=torch.float32))

    def _dropped(self, low: Tensor) -> Tensor:
        """[..., rank], what dropout leaves of it; all of it where nothing is learnt, as in validation."""
        return low if self.kept is None or not torch.is_grad_enabled() else low * self.kept.to(low)

    def _scaled(self, low: Tensor) -> Tensor:
        """[..., rank] by the change's scale: here it costs least."""
        return low if self.scale == 1 else self.scale * low

    def tensors(self) -> dict[str, Tensor]:
        """Those of the adapter, by the names that a file has behind the layer's."""
        raise NotImplementedError

    def reset(self, seed: int, name: str) -> None:
        """Begin without effect, drawn from (seed, name of the layer)."""
        raise NotImplementedError


class LoraLinear(AdapterLinear):
    """LoRA (Hu et al., arXiv 2106.09685): y = W x + b + scale B (A x), A [rank, in] and B [out, rank]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__(base, rank, scale)
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def reset(self, seed: int, name: str) -> None:
        """A: uniform in +-sqrt(6 / (1 + 5) / in_features), as PEFT's Kaiming. B: 0."""
        a = self.lora_A.weight
        uniform = _uniform(a, seed, f"lora {name}")
        (rows, columns), (row, column) = part_of(a)
        local(a).copy_(uniform[row : row + rows, column : column + columns] / math.sqrt(self.base.in_features))
        local(self.lora_B.weight).zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return self.base(x)
        low = self._dropped(F.linear(x, self.lora_A.weight.to(x.dtype)))
        return _plus_product(self.base(x), self._scaled(low), self.lora_B.weight.to(x.dtype))


class DoraLinear(LoraLinear):
    """DoRA (Liu et al., arXiv 2402.09353): y = m (W + D) x / |W + D| + b, D = scale B A, with a magnitude m and a norm
    for each row. No gradient goes through the norm (section 4.3 of the paper)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__(base, rank, scale)
        self.lora_magnitude_vector = nn.Parameter(base.weight.new_empty(base.out_features, dtype=torch.float32))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def reset(self, seed: int, name: str) -> None:
        """As LoRA; m: the norms of the weight's rows."""
        super().reset(seed, name)
        self.lora_magnitude_vector.copy_(self.base.weight.float().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return self.base(x)
        factor = self.lora_magnitude_vector / self._norms()
        low = self._dropped(F.linear(x, self.lora_A.weight.to(x.dtype)))
        y = _plus_product(F.linear(x, self.base.weight), self._scaled(low), self.lora_B.weight.to(x.dtype))
        y = y * factor.to(x.dtype)
        return y if self.base.bias is None else y + self.base.bias

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """|W + D| of each row, from |W|^2 + 2 scale B (A W^T) + scale^2 B (A A^T) B^T: the sum is never formed."""
        weight, a, b = self.base.weight.float(), self.lora_A.weight, self.lora_B.weight
        mixed = ((weight @ a.T) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        squares = weight.square().sum(1) + 2 * self.scale * mixed + self.scale**2 * own
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


class LokrLinear(AdapterLinear):
    """LoKr (Yeh et al., arXiv 2309.14859): D = scale W1 (x) W2, W1 [a, b] and W2 [c, d] with a c = out and b d = in.

    a and b are the largest divisors of their sides up to `factor`, or up to the root where that is 0. W2 is a product
    of two matrices of `rank` unless the rank is half of its longer side or more; whole, it has no scale, as in LyCORIS.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, factor: int = 0):
        (a, c), (b, d) = (divided(side, factor) for side in (base.out_features, base.in_features))
        whole = rank >= max(c, d) / 2
        super().__init__(base, 0 if whole else rank, 1.0 if whole else scale)
        self.lokr_w1 = self._matrix(a, b)
        if whole:
            self.lokr_w2 = self._matrix(c, d)
        else:
            self.lokr_w2_a, self.lokr_w2_b = self._matrix(c, rank), self._matrix(rank, d)

    def tensors(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named_parameters(recurse=False)}

    def reset(self, seed: int, name: str) -> None:
        """W1, and the first part of W2: uniform in +-1 / sqrt(columns). The last one: 0."""
        for part, p in self.tensors().items():
            p.copy_(_uniform(p, seed, f"lora {name} {part}") / math.sqrt(p.shape[1]))
        (self.lokr_w2_b if self.rank else self.lokr_w2).zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return self.base(x)
        first = self.lokr_w1.to(x.dtype)
        columns = x.shape[-1] // first.shape[1]
        parts = x.unflatten(-1, (first.shape[1], columns))
        if self.rank:
            low = self._dropped(F.linear(parts, self.lokr_w2_b.to(x.dtype)))
            second = F.linear(low, self.lokr_w2_a.to(x.dtype))
        else:
            second = F.linear(parts, self.lokr_w2.to(x.dtype))
        return self.base(x) + self.scale * (first @ second).flatten(-2)


def _plus_product(y: Tensor, low: Tensor, weight: Tensor) -> Tensor:
    """y + low weight^T, in one pass over y: [..., out], [..., rank], [out, rank]."""
    if y.dtype != low.dtype:  # a base below autocast
        return y + F.linear(low, weight)
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), weight.t()).view_as(y)


def divided(side: int, factor: int) -> tuple[int, int]:
    """(p, q) with p q = side and p the largest divisor up to `factor`; 0: up to the root of side."""
    most = min(factor, side) if factor else math.isqrt(side)
    first = next(p for p in range(most, 0, -1) if side % p == 0)
    return first, side // first


def _uniform(like: Tensor, seed: int, name: str) -> Tensor:
    """In (-1, 1), of the whole shape of `like`, float32 on the CPU."""
    return 2 * torch.special.ndtr(normal(tuple(like.shape), seed, name)) - 1


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before them, and no gradients."""
    adapters = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    try:
        for adapter in adapters:
            adapter.off = True
        with torch.no_grad():
            yield
    finally:
        for adapter in adapters:
            adapter.off = False


def draw_kept(model: nn.Module, dropout: float, seed: int, sample: int | None) -> None:
    """Draw what dropout keeps of each adapter in the micro-batch that begins with `sample`; None: all parts count."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            module.kept = None
            if dropout and module.rank and sample is not None:
                draws = generator(seed, f"dropout {name}", sample=sample).random(module.rank)
                kept = torch.from_numpy((draws >= dropout) / (1 - dropout))
                module.kept = kept.to(module.weight.device, torch.float32)
