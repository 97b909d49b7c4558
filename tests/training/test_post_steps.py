"""Stochastic steps: their formulas, the distribution that they keep, and the distance between two of them."""

import math

import pytest
import torch

from qwen_image_fast.training.rollout.steps import Step, divergence, guided, log_probability, window

LEVELS = torch.linspace(1, 0, 11).tolist()


def a_step(kind, k=3, noise=0.7):
    return Step(LEVELS[k], LEVELS[k + 1], LEVELS[1], kind, noise)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_the_mean_is_linear_in_the_velocity(kind):
    step, x, v = a_step(kind), torch.tensor(0.4, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    slope = (step.mean(x, v + 1) - step.mean(x, v)).item()
    assert slope == pytest.approx(step.by_velocity, rel=1e-12)


def test_the_flow_step_is_the_report_s():
    """x + [v + s^2 / (2 t) (x + (1 - t) v)] dt, and KL = |dt| / 2 (s (1 - t) / (2 t) + 1 / s)^2 |v - v'|^2."""
    step, x, v = a_step("flow"), torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    t, dt, s = step.sigma, step.dt, 0.7 * math.sqrt(step.sigma / (1 - step.sigma))
    assert torch.allclose(step.mean(x, v), x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * dt, rtol=1e-12)
    assert step.std == pytest.approx(s * math.sqrt(-dt))
    other = torch.randn(5, dtype=torch.float64)
    expected = -dt / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * (v - other).square().mean()
    assert divergence(v, other, step).item() == pytest.approx(expected.item(), rel=1e-10)
    # Flow-GRPO's code leaves |dt| out of the denominator.
    assert divergence(v, other, step, "flow_grpo").item() == pytest.approx(expected.item() * -dt, rel=1e-10)


def test_dance_adds_a_constant_amount_by_the_score():
    step, x, v = a_step("dance"), torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x0 = x - step.sigma * v
    score = -(x - (1 - step.sigma) * x0) / step.sigma**2
    assert torch.allclose(step.mean(x, v), x + v * step.dt - 0.5 * 0.7**2 * score * step.dt, rtol=1e-10)


def test_the_first_step_divides_by_the_second_level():
    step = Step(1.0, 0.9, 0.9, "flow", 0.7)
    assert step.amount == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)))


@pytest.mark.parametrize("kind, least, most", [("flow", 0.28, 0.32), ("dance", 0.28, 0.32), ("cps", 0.15, 0.24)])
def test_the_variance_of_the_data_is_kept(kind, least, most):
    """Data N(0, 0.3) with its exact velocity: flow and dance keep the variance as steps grow, CPS shrinks it."""
    steps, variance = 200, 0.3
    levels = torch.linspace(1, 0, steps + 1).tolist()
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=draws, dtype=torch.float64)
    for k in range(steps - 1):
        step = Step(levels[k], levels[k + 1], levels[1], kind, 0.7)
        a, b = 1 - step.sigma, step.sigma
        total = a**2 * variance + b**2
        v = (b - a * variance) / total * x  # E[eps - x0 | x]
        x = step.mean(x, v) + step.std * torch.randn(len(x), generator=draws, dtype=torch.float64)
    assert least < x.var().item() < most


def test_the_log_probability_is_a_normal_one():
    step, mean = a_step("flow"), torch.randn(7, dtype=torch.float64)
    after = mean + 0.1
    normal = torch.distributions.Normal(mean, torch.tensor(step.std, dtype=torch.float64))
    assert log_probability(after, mean, step).item() == pytest.approx(normal.log_prob(after).mean().item(), rel=1e-12)


def test_where_the_window_is():
    """Everywhere in the first steps by chance; or one further now and then, and back to the first."""
    assert {window(k / 100, 0, 2, 5, "random", 1).start for k in range(100)} == {0, 1, 2, 3}
    assert [window(0.5, n, 2, 4, "progressive", 2).start for n in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert window(0.999999, 0, 1, 5, "random", 1) == range(4, 5)


def test_guidance_keeps_the_norm_of_each_token():
    cond, uncond = torch.randn(4, 6), torch.randn(4, 6)
    mixed = guided(cond, uncond, 4.0)
    assert torch.allclose(mixed.norm(dim=-1), cond.norm(dim=-1))
