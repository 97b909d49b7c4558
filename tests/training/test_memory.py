"""Estimates of memory and operations, and the refusal of a run that cannot fit."""

import pytest
import torch

from qwen_image_fast.tiny import tiny_configs
from qwen_image_fast.training.engine import memory
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.read import build
from qwen_image_fast.training.run import train
from qwen_image_fast.training.tasks import flops

FULL = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60}


def test_full_tuning_of_the_released_model_needs_what_its_states_need():
    recipe = build({"kind": "flow", "batch": 1, "model": {"gradient_checkpointing": True}})
    needed = memory.estimate(recipe, FULL, 8_000_000_000, 20_430_401_088, torch.bfloat16, 4096 + 256)
    assert needed.weights == pytest.approx(57e9, rel=0.01) and needed.training == pytest.approx(409e9, rel=0.01)
    assert 3e9 < needed.activations < 5e9
    plain = build({"kind": "flow", "batch": 1})
    assert memory.estimate(plain, FULL, 0, 0, torch.bfloat16, 4096).activations > 30e9


def test_adapters_need_little():
    full = memory.check_recipe(
        build({"kind": "flow", "model": {"train_text_encoder": False}}), torch.device("cpu"), torch.float32
    )
    lora = build({"kind": "flow", "lora": {"rank": 4}, "model": {"train_text_encoder": False}})
    adapters = memory.check_recipe(lora, torch.device("cpu"), torch.float32)
    # 5 blocks, 4 square layers of width 192, rank 4, in and out, 4 float32 values each
    assert adapters.training == 5 * 4 * 4 * 2 * 192 * 16 < full.training / 50


def test_a_recipe_that_cannot_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 10**8)
    path = tmp_path / "r.yaml"
    path.write_text("kind: flow\nbatch: 64\nmodel: {folder: new}\ndata: {source: squares}\n")
    with pytest.raises(RecipeError, match=r"needs about .* GB .*optimiser .*, 0.1 GB are free: lower batch"):
        train(path, (), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_available_memory_is_plausible():
    assert 10**8 < memory.available(torch.device("cpu")) < 2**50


def test_operations_of_a_step():
    # One layer of width 1: 12 weights, 2 operations each, and attention over all pairs; three passes.
    config = {"num_attention_heads": 1, "attention_head_dim": 1, "num_layers": 1}
    assert flops.step_flops(config, [3, 5], [1, 1]) == 3 * (24 * 4 + 4 * 16 + 24 * 6 + 4 * 36)
    tiny = flops.step_flops(tiny_configs()["transformer"], [64], [20])
    assert 1.0e9 < tiny < 1.5e9
