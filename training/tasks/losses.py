"""The losses of what comes after training, each from velocities: v of the model, of a reference, of the old policy.

Notation: x0 a picture's latents, eps noise, sigma a level, x = (1 - sigma) x0 + sigma eps, u = eps - x0 the velocity
that flow matching wants, A an advantage. Errors and distances are means over a sample's values, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.training.rollout.draw import Transition
from qwen_image_fast.training.rollout.steps import divergence, log_probability
from qwen_image_fast.training.velocity import FlowSample, velocity_errors


def dpo(errors: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, dict[str, float]]:
    """L = -log sigmoid(-beta / 2 (D_w - D_l)) of each pair, D = |v - u|^2 - |v_ref - u|^2.

    Diffusion-DPO (Wallace et al., arXiv 2311.12908) in the flow form of the Qwen-Image report (arXiv 2508.02324,
    equation 3), with the factor 1/2 and the means of the public code; beta is twice the report's for errors of one
    reduction, and beta for sums is beta for means / number of values. Both pictures of a pair have one noise at one
    level. Where the model is the reference the loss is ln 2.

    Args:
        errors, reference: float32 [2 pairs], chosen and rejected in turn, of the model and of the reference.

    Returns:
        [pairs], and for the log: the share of pairs that the model orders rightly, and D of chosen and rejected.
        Both rising is unlearning: the loss falls because the rejected one gets worse faster.
    """
    difference = (errors - reference).view(-1, 2)
    margin = difference[:, 0] - difference[:, 1]
    seen = difference.detach()
    return -F.logsigmoid(-0.5 * beta * margin), {
        "implicit_accuracy": float((seen[:, 0] < seen[:, 1]).float().mean()),
        "delta_chosen": float(seen[:, 0].mean()),
        "delta_rejected": float(seen[:, 1].mean()),
    }


def nft(
    velocity: Sequence[Tensor], old: Sequence[Tensor], samples: Sequence[FlowSample], advantage: Tensor, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """L = 5 / beta [r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-] of each sample (DiffusionNFT, arXiv 2509.16117).

    v+ = beta v + (1 - beta) v_old, v- = (1 + beta) v_old - beta v, x0+- = x - sigma v+-, r = clip(A / 10 + 1/2, 0, 1)
    and w = mean |x0+- - x0| without gradient, at least 1e-5. Where v = v_old the value says nothing of the reward, and
    the gradient is that of 5 (2 r - 1) |x - sigma v - x0|^2 / w: regression weighted by the advantage.
    """
    share = (advantage / 10 + 0.5).clamp(0, 1)
    losses, moved = [], []
    for v, v_old, s, r in zip(velocity, old, samples, share):
        x0 = s.target.float()
        x = (1 - s.sigma) * x0 + s.sigma * s.noise.float()
        parts = []
        for toward in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
            off = x - s.sigma * toward - x0
            parts.append(off.square().mean() / off.detach().abs().mean().clamp_min(1e-5))
        losses.append(5 / beta * (r * parts[0] + (1 - r) * parts[1]))
        moved.append((v.detach() - v_old).square().mean())
    return torch.stack(losses), {"deviation": float(torch.stack(moved).mean())}


def awm(
    velocity: Sequence[Tensor], samples: Sequence[FlowSample], advantage: Tensor, power: float | None
) -> tuple[Tensor, dict[str, float]]:
    """L = A e of each sample, e = |v - u|^2 (advantage-weighted matching, arXiv 2509.25050): e falls where A > 0 and
    rises where A < 0. power p: ((e + 1e-10)^p) / p in the place of e, whose slope falls as e grows."""
    errors = velocity_errors(velocity, samples)
    shaped = errors if power is None else (errors + 1e-10).pow(power) / power
    return advantage * shaped, {"error": float(errors.detach().mean())}


@dataclass
class GrpoTerms:
    """clip, guard: of the ratio. kl, form: of the distance from the reference."""

    clip: float
    guard: bool
    kl: float
    form: str


def grpo(
    velocity: Sequence[Tensor],
    old: Sequence[Tensor],
    transitions: Sequence[Transition],
    advantage: Tensor,
    reference: Sequence[Tensor] | None,
    terms: GrpoTerms,
) -> tuple[Tensor, dict[str, float]]:
    """L = -min(r A, clip(r, 1 +- eps) A) + kl KL of each stochastic step (Flow-GRPO, arXiv 2505.05470, equations 4-8).

    r = exp(log p - log p_old) of the state that the step came to, both from velocities of one batch of one composition:
    where the weights are the old ones r is exactly 1, whatever kernels the batch's size chooses. "guard": r = exp((log
    p - log p_old + |mean - mean_old|^2 / (2 std^2)) std), whose mean is 1 and whose spread does not depend on the step,
    and the loss divided by |dt| (GRPO-Guard, arXiv 2510.22319).
    """
    losses, logs, distances = [], [], []
    for number, (v, v_old, taken, a) in enumerate(zip(velocity, old, transitions, advantage)):
        step = taken.step
        mean, before = step.mean(taken.before, v), step.mean(taken.before, v_old)
        log = log_probability(taken.after, mean, step) - log_probability(taken.after, before, step)
        if terms.guard:
            log = (log + (mean - before).square().mean() / (2 * step.std**2)) * step.std
        ratio = torch.exp(log)
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - terms.clip, 1 + terms.clip) * a)
        loss = loss / -step.dt if terms.guard else loss
        if reference is not None:
            apart = divergence(v, reference[number], step, terms.form)
            distances.append(apart.detach())
            loss = loss + terms.kl * apart
        losses.append(loss)
        logs.append(ratio.detach())
    ratios = torch.stack(logs)
    found = {
        "ratio_mean": float(ratios.mean()),
        "ratio_most": float((ratios - 1).abs().max()),
        "clipped": float(((ratios - 1).abs() > terms.clip).float().mean()),
    }
    return torch.stack(losses), found | ({"kl": float(torch.stack(distances).mean())} if distances else {})


def distance(velocity: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """|v - v'|^2 of each sample, float32 [samples]."""
    return torch.stack([(a - b).square().mean() for a, b in zip(velocity, other)])
