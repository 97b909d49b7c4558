"""Each loss at its first step, where it must be one known number, and the direction of its gradient."""

import math

import pytest
import torch
from post_helpers import post_recipe
from trainer_helpers import small_transformer

from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler
from qwen_image_fast.training.lora import add_lora
from qwen_image_fast.training.recipe.flow import LoraRecipe
from qwen_image_fast.training.rollout.draw import Condition, Stochastic, draw
from qwen_image_fast.training.tasks import losses
from qwen_image_fast.training.tasks.collected import Picture, Round
from qwen_image_fast.training.tasks.learning import Learning
from qwen_image_fast.training.tasks.policies import Policies
from qwen_image_fast.training.trainable import choose_trainable
from qwen_image_fast.training.velocity import FlowSample, interpolated, velocities, velocity_errors

SHAPE = (1, 2, 2)


def random_like(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(lora=0):
    transformer = small_transformer()
    if lora:
        add_lora(transformer, LoraRecipe(rank=lora), 0)
    choose_trainable(transformer, adapters=lora > 0)
    return transformer


def learning(folder, kind, transformer, **changes):
    recipe = post_recipe(folder, kind, **changes)
    learns = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
    made = Learning(transformer, Policies(learns), recipe)
    for policy in sorted(recipe.policies):
        made.policies.keep(policy)
    return made


def a_round(transformer, prompts=2, group=3, stochastic=None, levels=4):
    config = transformer.config
    conditions = [Condition(random_like(i, 3 + i, config.joint_attention_dim), None, SHAPE) for i in range(prompts)]
    wide = [conditions[i] for i in range(prompts) for _ in range(group)]
    noise = [random_like(100 + n, 4, config.in_channels) for n in range(len(wide))]
    x0, taken = draw(transformer, FlowMatchEulerDiscreteScheduler(), wide, noise, steps=levels, stochastic=stochastic)
    pictures = [
        Picture(n // group, x, advantage=float(n % group) - 0.9, taken=t) for n, (x, t) in enumerate(zip(x0, taken))
    ]
    return Round(0, conditions, pictures, [(n,) for n in range(len(pictures))])


@pytest.mark.parametrize("lora", [0, 4])
def test_dpo_begins_at_ln_2(folder, lora):
    """The reference is a copy of all weights, or the model without its adapters."""
    transformer = model(lora)
    made = learning(folder, "dpo", transformer)
    samples = []
    for n in range(3):
        noise = random_like(n, 4, transformer.config.in_channels)
        for k in range(2):
            x0 = random_like(10 + 2 * n + k, 4, transformer.config.in_channels)
            samples.append(FlowSample(x0, SHAPE, noise, 0.3 + 0.2 * n))
    texts = [random_like(50 + n // 2, 5, transformer.config.joint_attention_dim) for n in range(6)]
    found = made.pairs(samples, texts)
    assert found.per_sample.tolist() == [torch.tensor(math.log(2)).item()] * 3
    assert found.extra["delta_chosen"] == 0 and found.extra["delta_rejected"] == 0

    learns = list(made.policies.parameters.values())
    for gradient, p in zip(torch.autograd.grad(found.total, learns, allow_unused=True), learns):
        p.data -= 1e-4 * gradient if gradient is not None else 0
    after = made.pairs(samples, texts)
    assert after.total < found.total and after.extra["implicit_accuracy"] == 1
    assert after.extra["delta_chosen"] < after.extra["delta_rejected"]


def test_dpo_by_hand():
    """Two pairs: D_w - D_l = -0.3 and 0.1; with beta 4 the loss is log(1 + exp(2 (D_w - D_l)))."""
    errors, before = torch.tensor([0.5, 0.9, 0.4, 0.4]), torch.tensor([0.6, 0.7, 0.3, 0.4])
    found, extra = losses.dpo(errors, before, 4.0)
    wanted = [math.log(1 + math.exp(2 * d)) for d in (-0.1 - 0.2, 0.1 - 0.0)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert extra == pytest.approx({"implicit_accuracy": 0.5, "delta_chosen": 0.0, "delta_rejected": 0.1}, abs=1e-6)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_the_first_ratio_is_exactly_1(folder, kind, ratio):
    transformer = model()

    def noise(n, k):
        return random_like(1000 + 10 * n + k, 4, transformer.config.in_channels)

    made = a_round(transformer, stochastic=Stochastic(kind, 0.7, range(1, 3), noise))
    learns = learning(folder, "grpo", transformer, batch=4, step=kind, ratio=ratio)
    found = learns.from_round(made, 0, 1)  # another batch than the pictures were drawn in
    assert found.extra == {"ratio_mean": 1.0, "ratio_most": 0.0, "clipped": 0.0, "kl": 0.0}
    # The loss is -A, of each step; divided by |dt| under the guard. Its gradient is not zero.
    if ratio == "plain":
        order = learns._taken(made, 1)
        wanted = [-made.pictures[i].advantage for (i,) in order for _ in range(2)]
        assert found.per_sample.tolist() == pytest.approx(wanted)
    gradient = torch.autograd.grad(found.total, transformer.proj_out.weight)[0]
    assert gradient.abs().max() > 0


def test_a_clipped_ratio_has_no_gradient():
    """A > 0 and r > 1 + eps, or A < 0 and r < 1 - eps: the step has been made already."""
    transformer = model()

    def noise(n, k):
        return random_like(1000 + 10 * n + k, 4, transformer.config.in_channels)

    made = a_round(transformer, stochastic=Stochastic("flow", 0.7, range(1, 2), noise))
    taken = [picture.taken[0] for picture in made.pictures[:2]]
    old = [random_like(7 + n, 4, transformer.config.in_channels) for n in range(2)]
    v = [((t.after - t.step.mean(t.before, t.before * 0)) / t.step.by_velocity).requires_grad_() for t in taken]
    terms = losses.GrpoTerms(1e-4, False, 0.0, "exact")
    found, extra = losses.grpo(v, old, taken, torch.tensor([1.0, -1.0]), None, terms)  # both more likely than before
    found.sum().backward()
    assert extra["clipped"] == 1 and extra["ratio_mean"] > 1 + 1e-4
    assert v[0].grad.abs().max() == 0  # and where A < 0 the more likely one must become less so
    assert found[1] > 1


def test_the_guard_s_ratio_has_the_mean_1():
    """log r + |mean - mean_old|^2 / (2 std^2) is z (mean - mean_old) / std, whose expectation is 0."""
    transformer = model()

    def noise(n, k):
        return random_like(1000 + 10 * n + k, 4, transformer.config.in_channels)

    made = a_round(transformer, prompts=8, stochastic=Stochastic("flow", 0.7, range(1, 2), noise))
    taken = [picture.taken[0] for picture in made.pictures]
    conditions = [made.conditions[picture.prompt] for picture in made.pictures]
    samples = [c.at(t.before, t.step.sigma) for c, t in zip(conditions, taken)]
    texts = [c.text for c in conditions]
    moved = [random_like(7000 + n, 4, transformer.config.in_channels) * 2 for n in range(len(taken))]
    with torch.no_grad():
        found = {}
        for guard in (False, True):
            old = velocities(transformer, samples, [t.before for t in taken], texts)
            v = [was + m for was, m in zip(old, moved)]
            terms = losses.GrpoTerms(1e-4, guard, 0.0, "exact")
            found[guard] = losses.grpo(v, old, taken, torch.ones(len(taken)), None, terms)[1]["ratio_mean"]
    assert found[False] < 0.9 and abs(found[True] - 1) < 0.05


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_s_first_gradient_is_weighted_regression(beta):
    """At v = v_old: 5 (2 r - 1) of the gradient of |x - sigma v - x0|^2 / w."""
    transformer = model()
    channels = transformer.config.in_channels
    samples = [FlowSample(random_like(n, 4, channels), SHAPE, random_like(20 + n, 4, channels), 0.2 + 0.2 * n)
               for n in range(3)]  # fmt: skip
    texts = [random_like(50 + n, 5, transformer.config.joint_attention_dim) for n in range(3)]
    advantage = torch.tensor([2.0, -3.0, 0.5])
    v = velocities(transformer, samples, interpolated(samples), texts)
    found, extra = losses.nft(v, [t.detach() for t in v], samples, advantage, beta)
    weight = transformer.proj_out.weight
    got = torch.autograd.grad(found.mean(), weight, retain_graph=True)[0]

    parts = []
    for own, s, a in zip(v, samples, advantage):
        off = (1 - s.sigma) * s.target + s.sigma * s.noise - s.sigma * own - s.target
        share = (a / 10 + 0.5).clamp(0, 1)
        parts.append(5 * (2 * share - 1) * off.square().mean() / off.detach().abs().mean())
    wanted = torch.autograd.grad(torch.stack(parts).mean(), weight)[0]
    assert extra["deviation"] == 0
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("power", [None, 0.25])
def test_awm_lowers_the_error_of_what_was_better(power):
    transformer = model()
    channels = transformer.config.in_channels
    samples = [FlowSample(random_like(n, 4, channels), SHAPE, random_like(20 + n, 4, channels), 0.5) for n in range(2)]
    texts = [random_like(50, 5, transformer.config.joint_attention_dim)] * 2
    learns = [p for p in transformer.parameters() if p.requires_grad]

    def errors():
        return velocity_errors(velocities(transformer, samples, interpolated(samples), texts), samples)

    before = errors()
    v = velocities(transformer, samples, interpolated(samples), texts)
    found, _ = losses.awm(v, samples, torch.tensor([1.0, -1.0]), power)
    for gradient, p in zip(torch.autograd.grad(found.mean(), learns), learns):
        p.data -= 1e-3 * gradient
    assert errors()[0] < before[0] and errors()[1] > before[1]


def test_policies_swap_and_follow():
    transformer = model(lora=4)
    learns = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
    policies = Policies(learns)
    policies.keep("old")
    before = {n: p.detach().clone() for n, p in learns.items()}
    for p in learns.values():
        p.data += 1
    with policies.use("old"):
        assert all(torch.equal(p, before[n]) for n, p in learns.items())
    assert all(torch.equal(p, before[n] + 1) for n, p in learns.items())
    policies.follow("old", 0.75)
    assert all(torch.allclose(policies.kept["old"][n], before[n] + 0.25) for n in learns)
    other = Policies(learns)
    other.load(policies.state())
    assert all(torch.equal(other.kept["old"][n], policies.kept["old"][n]) for n in learns)
