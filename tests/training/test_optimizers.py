"""Every optimiser, schedule and noise level of a recipe: what it does, and that a run goes on with it bit by bit."""

import math

import pytest
import torch
from trainer_helpers import log_of, small_recipe, start, weights

from qwen_image_fast.training.engine.optimizer import learning_rate
from qwen_image_fast.training.engine.rounding import StochasticAdamW, round_stochastically
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.run import OptimizerRecipe

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
CHOICES = {
    "adafactor": {"optimizer__name": "adafactor"},
    "prodigy": {"optimizer__name": "prodigy", "optimizer__lr": 1.0},
    "adamw8bit": {"optimizer__name": "adamw8bit"},
    "muon": {"optimizer__name": "muon"},
    "no masters": {"optimizer__masters": "none", "model__dtype": "bfloat16", "model__train_text_encoder": False},
    "restarts and min-snr": {"optimizer__schedule": "cosine-restarts", "optimizer__cycles": 2,
                             "sigma__name": "resolution", "sigma__weighting": "min-snr"},
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_learns_and_goes_on_bit_by_bit(folder, tmp_path, name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    recipe = small_recipe(folder, steps=6, checkpoint__every=3, optimizer__ema=0.9, **CHOICES[name])
    whole = start(recipe, tmp_path / "whole")
    before = weights(whole)
    whole.run()
    assert any(not torch.equal(w, before[n]) for n, w in weights(whole).items())

    stopped = start(recipe, tmp_path / "stopped")
    step = stopped.train_step
    stopped.train_step = lambda batches: step(batches) if stopped.step < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    resumed = start(recipe, tmp_path / "stopped", resume=True)
    assert resumed.step == 3
    resumed.run()
    assert all(torch.equal(w, weights(resumed)[n]) for n, w in weights(whole).items())
    ends = [trainer.optimizer.state() for trainer in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(v, ends[1][n]) for n, v in ends[0].items())
    assert all(torch.equal(v, resumed.ema.average[n]) for n, v in whole.ema.average.items())
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")


def test_without_masters_there_are_none(folder, tmp_path):
    trainer = start(small_recipe(folder, **CHOICES["no masters"]), tmp_path)
    assert all(m is trainer.parameters[n] and m.dtype == torch.bfloat16 for n, m in trainer.optimizer.masters.items())
    assert {average.dtype for average in trainer.ema.average.values()} == {torch.float32}


def test_rounding_keeps_the_mean_and_what_needs_no_rounding():
    values = torch.linspace(1, 2, 7).repeat(20000, 1)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    assert (rounded.mean(0) - values[0]).abs().max() < 2e-4  # the rounding step is 8e-3
    near = torch.stack([values[0].bfloat16().float() - 2**-7, values[0].bfloat16().float() + 2**-7])
    assert ((rounded >= near[0]) & (rounded <= near[1])).all()
    exact = torch.tensor([0.0, 1.0, -2.5, math.inf, -math.inf, math.nan])
    assert torch.equal(round_stochastically(exact, torch.Generator()).float().nan_to_num(7), exact.nan_to_num(7))


def test_its_updates_are_those_of_adamw_on_average():
    """The mean of many weights of one gradient, where plain rounding to 16 bits would change none of them."""
    ones = torch.ones(40000, dtype=torch.bfloat16)
    own, plain = torch.nn.Parameter(ones.clone()), torch.nn.Parameter(torch.ones(1))
    options = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    optimizers = StochasticAdamW([own], 0, **options), torch.optim.AdamW([plain], **options)
    for step in range(10):
        own.grad = torch.full_like(own, 0.5 + step)
        plain.grad = torch.full_like(plain, 0.5 + step)
        for optimizer in optimizers:
            optimizer.step()
    assert abs(float(own.detach().float().mean()) - float(plain.detach())) < 1e-4 < 1 - float(plain.detach())
    assert torch.equal((ones.float() - 1e-4).bfloat16(), ones)


def test_the_cosine_with_restarts():
    recipe = OptimizerRecipe(lr=1.0, schedule="cosine-restarts", cycles=2, warmup=2)
    rates = [learning_rate(recipe, step, 22) for step in range(22)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[12] == 1.0 and min(rates[2:]) == rates[11]
    assert rates[2:12] == pytest.approx(rates[12:])
    assert rates[7] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer__name": "lion"}, "must be of adamw, muon, adamw8bit, adafactor, prodigy, got 'lion'"),
        ({"optimizer__cycles": 2}, "optimizer.cycles must be 1 unless optimizer.schedule is cosine-restarts"),
        ({"optimizer__masters": "none", "optimizer__name": "muon"}, "optimizer.masters must be float32 with muon"),
        ({"optimizer__masters": "none", "lora__rank": 2, "model__train_text_encoder": False},
         "optimizer.masters must be float32 for adapters"),
    ],
)  # fmt: skip
def test_what_cannot_be(folder, changes, message):
    with pytest.raises(RecipeError, match=message):
        small_recipe(folder, **changes)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_is_a_sentence(folder, tmp_path, monkeypatch, name):
    import sys

    for module in [m for m in sys.modules if m.partition(".")[0] == PACKAGES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    monkeypatch.setitem(sys.modules, f"{PACKAGES[name]}.optim", None)
    with pytest.raises(ImportError, match=f"optimizer.name {name} needs the package {PACKAGES[name]}: pip install"):
        start(small_recipe(folder, optimizer__name=name), tmp_path)
