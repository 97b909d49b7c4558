"""Master weights, the optimisers on them, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen_image_fast.training.engine.updates import load_state, make_optimizer, state_of
from qwen_image_fast.training.parallel.layout import holders, local
from qwen_image_fast.training.recipe.run import OptimizerRecipe


def learning_rate(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """lr of step 0 ... steps - 1: linear warm-up lr (step + 1) / warmup, then constant, or the half cosine
    lr (f + (1 - f) (1 + cos(pi t)) / 2), t in [0, 1] over the steps behind the warm-up, f = final_lr; with restarts
    t runs from 0 to 1 in each of `cycles` parts of them (Loshchilov and Hutter, arXiv 1608.03983)."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    t = (step - recipe.warmup) / max(steps - recipe.warmup, 1)
    if recipe.schedule == "cosine-restarts":
        t = t * recipe.cycles % 1.0
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * (1 + math.cos(math.pi * t)) / 2)


class Optimizer:
    """One update of all trainable weights: gradients summed in float32, clipped, then the optimiser of the recipe.

    A float32 parameter is its own master weight. A 16-bit one has a float32 master that takes the updates and is
    rounded into it after each: updates smaller than the rounding step of a 16-bit weight would be lost. With
    `masters: none` it is its own, its gradients are of 16 bits, and updates are rounded stochastically (rounding.py).

    Of a parameter that is split over ranks, the master is this rank's part, and so are the states.

    Args:
        parameters: trainable parameters by name. seed: of the run.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: OptimizerRecipe, seed: int = 0):
        self.parameters, self.seed = dict(parameters), seed
        self.masters: dict[str, nn.Parameter] = {}
        for name, p in parameters.items():
            own = (p.dtype == torch.float32 or recipe.masters == "none") and not isinstance(p, DTensor)
            self.masters[name] = p if own else nn.Parameter(local(p.detach()).float())
        self._build(recipe)

    def enter(self, recipe: OptimizerRecipe, *, keep: bool) -> None:
        """Go on with the settings of another recipe, with the states so far or with none."""
        states = self.state() if keep else {}
        self._build(recipe)
        self.load_state(states)

    def _build(self, recipe: OptimizerRecipe) -> None:
        self.recipe = recipe
        matrices = [n for n, p in self.parameters.items() if p.ndim >= 2]
        muon = [n for n in matrices if self._by_muon(n)]
        groups = [
            {"params": [self.masters[n] for n in matrices if n not in set(muon)], "weight_decay": recipe.weight_decay},
            {"params": [p for n, p in self.masters.items() if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups:
            self.optimizers.append(make_optimizer(groups, recipe, self.seed))
        if muon:
            # RMS matched to AdamW's, so that both take the same learning rate (Moonlight, arXiv 2502.16982).
            self.optimizers.append(
                torch.optim.Muon(
                    [self.masters[n] for n in muon],
                    lr=recipe.lr,
                    weight_decay=recipe.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def _by_muon(self, name: str) -> bool:
        if self.recipe.name != "muon":
            return False
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError("optimizer.name muon needs a torch that has torch.optim.Muon (2.9 or later)")
        return "transformer_blocks." in name and self.masters[name].ndim == 2

    def accumulate(self) -> None:
        """Add the gradients of a micro-batch to those of the master weights."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is p or p.grad is None:
                continue
            grad = local(p.grad).float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            p.grad = None

    def clip(self) -> Tensor:
        """Scale all gradients so that their joint norm is at most `clip`; returns the norm before that."""
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.recipe.clip or math.inf)

    def squares(self, ranks: int) -> Tensor:
        """This rank's share of the squared norm of all gradients: added over all `ranks`, each part counts once."""
        total = torch.zeros((), dtype=torch.float32, device=next(iter(self.masters.values())).device)
        for name, master in self.masters.items():
            if master.grad is not None and master.numel():
                total += torch.linalg.vector_norm(master.grad).square() / holders(self.parameters[name], ranks)
        return total

    def clip_to(self, norm: float) -> None:
        """`clip` where the norm of all gradients is known."""
        if self.recipe.clip and math.isfinite(norm):
            scale = min(self.recipe.clip / (norm + 1e-6), 1.0)  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_([m.grad for m in self.masters.values() if m.grad is not None], scale)

    def step(self, lr: float) -> None:
        """Update the master weights and round them into the model; the gradients are gone afterwards."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        for name, p in self.parameters.items():
            master, own = self.masters[name], local(p.detach())
            if own.data_ptr() != master.data_ptr():
                own.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the optimisers' states, by "<parameter>/<state>"."""
        names = {id(m): n for n, m in self.masters.items()}
        return {name: value for optimizer in self.optimizers for name, value in state_of(optimizer, names).items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for full, value in tensors.items():
            name, _, key = full.rpartition("/")
            # AdamW's step counter lives where fused AdamW wants it, next to the weights.
            load_state(self.optimizers, self.masters[name], key, value)
