"""`accelerate(..., precision="int8")`: the drop-in in 8 bits, and back."""

import pytest
import torch
from accelerate_harness import count_fast_forwards, run, small_transformer
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from qwen_image_fast import accelerate, restore
from qwen_image_fast.models.int8_linear import Int8Linear


def distance(a, b):
    return ((a - b).pow(2).mean() / b.pow(2).mean()).sqrt().item()


def test_a_transformer_and_back(monkeypatch):
    model = small_transformer()
    before, layer = run(model), model.transformer_blocks[0].attn.to_q
    names = set(model.state_dict())
    calls = count_fast_forwards(monkeypatch)
    report = accelerate(model, precision="int8")
    assert "transformer: 24 linear layers compute in 8 bits" in str(report) and report.added > 0
    assert type(model.transformer_blocks[0].attn.to_q) is Int8Linear
    assert 0 < distance(run(model), before) < 0.03 and len(calls) == 1
    again = accelerate(model, precision="int8")
    assert again.added == report.added and 0 < (eight := distance(run(model), before)) < 0.03
    with pytest.raises(ValueError, match="precision must be int8, as it is already, or restore first, got 'int4'"):
        accelerate(model, precision="int4")
    restore(model)
    assert torch.equal(run(model), before) and model.transformer_blocks[0].attn.to_q is layer
    report = accelerate(model, precision="int4")
    assert "compute in 8 bits, of weights in 4, which" in str(report) and eight < distance(run(model), before) < 0.2
    restore(model)
    assert torch.equal(run(model), before)
    assert set(model.state_dict()) == names


def test_an_adapter_of_peft_beside():
    """Put on after, it is added; it stays when the layers go back; it cannot be merged in silence."""
    exact, model = small_transformer(), small_transformer()
    accelerate(model, precision="int8")
    config = LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    for m in (exact, model):
        torch.manual_seed(5)
        inject_adapter_in_model(config, m)
    assert 0 < distance(run(model), run(exact)) < 0.03
    with pytest.raises(RuntimeError, match="a layer in 8 bits has no weight"):
        model.transformer_blocks[0].attn.to_q.merge()
    restore(model)
    assert torch.equal(run(model), run(exact))


def test_what_is_left_alone_and_refused():
    model = small_transformer()
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)
    report = accelerate(model, precision="int8")
    assert "1 linear layers: not in 8 bits" in str(report)
    assert type(model.transformer_blocks[0].attn.to_q) is nn.Linear
    with pytest.raises(ValueError, match="accelerate: precision must be None or one of int8, int4, got 'int5'"):
        accelerate(small_transformer(), precision="int5")
    model = small_transformer()
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="a transformer with a quantisation of its own"):
        accelerate(model, precision="int8")
