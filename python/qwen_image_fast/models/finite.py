"""NaN and infinity in what models made, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def all_finite(x: Tensor) -> bool:
    """By one pass over `x`, without memory of its size; the answer is waited for."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def cause(models: Mapping[str, nn.Module], dtype: torch.dtype) -> str:
    """The end of a sentence about a result of `models` that is not finite: bad weights by name, else the dtype."""
    for part, model in models.items():
        for name, p in model.named_parameters():
            # A released weight is on the meta device; isfinite does not know all types of one byte.
            if not p.is_meta and not torch.isfinite(p if p.element_size() > 1 else p.float()).all():
                return f": {part} has NaN or infinity in {name}; load it again"
    wider = {torch.float16: "try bfloat16 or float32", torch.bfloat16: "try float32"}
    advice = wider.get(dtype, "they are damaged, or of another model")
    return f" in {str(dtype).removeprefix('torch.')}, though all weights of {' and '.join(models)} are; {advice}"
