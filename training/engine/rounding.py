"""16-bit weights without float32 masters: AdamW whose updates are rounded stochastically."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.training.randomness import key


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16: to one of the two neighbours, the nearer one the more often, so that the mean is the value
    (Gupta et al., arXiv 1502.02551). A random number below the last kept bit is added, and the rest is cut off."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    rounded = ((bits + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on bfloat16 weights; its moments are float32.

    An update that is smaller than the rounding step of a weight changes it now and then instead of never. What is
    drawn is a function of (seed, step, place of the parameter), so that a resumed run rounds alike.

    Args:
        seed: of the run. The others as of `torch.optim.AdamW`.
    """

    def __init__(
        self, params: Iterable[Any], seed: int, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float = 0,
    ):  # fmt: skip
        self.seed = seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        place = 0
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                place += 1
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.float()
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                state["step"] += 1
                step = int(state["step"])
                state["exp_avg"].lerp_(grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
                size = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
                value = p.float().mul_(1 - group["lr"] * group["weight_decay"])
                value.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - first**step))
                drawn = torch.Generator(p.device).manual_seed(key(self.seed, "rounding", step, place) % 2**63)
                p.copy_(round_stochastically(value, drawn))
