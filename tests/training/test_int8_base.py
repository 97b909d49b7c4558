"""Adapters on a base in 8 bits: what they learn, that a run goes on bit by bit, and where they work afterwards."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from trainer_helpers import log_of, small_recipe, start, weights

from qwen_image_fast import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from qwen_image_fast.models.int8_linear import Int8Linear
from qwen_image_fast.pipelines import residence
from qwen_image_fast.quantize import quantize
from qwen_image_fast.quantize_modulation import schedules_for
from qwen_image_fast.training.adapters import AdapterLinear
from qwen_image_fast.training.engine import memory
from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.recipe.curriculum import one_stage
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.run import make_task
from qwen_image_fast.weights.formats import open_weights

WORKING = 10**8


def on_int8(folder, **changes):
    usual = {"lora__rank": 8, "lora__targets": ["attention", "mlp"], "model__precision": "int8"}
    return small_recipe(folder, **{"model__train_text_encoder": False, **usual, **changes})


@pytest.mark.parametrize(
    "precision, checkpointing, alike", [("int8", False, 0.95), ("int8", True, 0.95), ("int4", True, 0.8)]
)
def test_a_run_goes_on_bit_by_bit_and_its_adapters_work_on_floats(folder, tmp_path, precision, checkpointing, alike):
    options = {
        "model__precision": precision,
        "steps": 12,
        "checkpoint__every": 4,
        "optimizer__lr": 1e-2,
        "accumulate": 2,
    }
    recipe = on_int8(folder, **options, model__gradient_checkpointing=checkpointing)
    whole = start(recipe, tmp_path / "whole")
    before = {n: b.clone() for n, b in whole.task.transformer.named_buffers()}
    assert {type(m.base) for m in whole.task.transformer.modules() if isinstance(m, AdapterLinear)} == {Int8Linear}
    whole.run()
    assert all(torch.equal(b, before[n]) for n, b in whole.task.transformer.named_buffers())
    stopped = start(recipe, tmp_path / "stopped")
    step = stopped.train_step
    stopped.train_step = lambda batches: step(batches) if stopped.step < 7 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    resumed = start(recipe, tmp_path / "stopped", resume=True)
    resumed.run()
    assert all(torch.equal(w, weights(resumed)[n]) for n, w in weights(whole).items())
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    floats = start(on_int8(folder, **{**options, "model__precision": None}), tmp_path / "floats")
    floats.run()
    # The same run on floats learns nearly the same: the change of each layer, as the vector of all its numbers.
    ours, theirs = (load_file(t.folder / "model" / "pytorch_lora_weights.safetensors") for t in (whole, floats))
    a, b = (torch.cat([state[n].flatten() for n in sorted(ours)]) for state in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > alike
    pipe = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 1.0, "seed": 0, "progress": False}
    plain = pipe("a red square", output_type="latent", **call).images[0]
    pipe.load_lora_weights(whole.folder / "model")
    assert not torch.equal(pipe("a red square", output_type="latent", **call).images[0], plain)


def test_with_a_limit_the_modulation_is_read_when_it_is_used(folder, tmp_path, monkeypatch):
    """The weights that learn are the same, bit by bit."""
    whole = start(on_int8(folder), tmp_path / "whole")
    whole.run()
    monkeypatch.setattr(residence, "resident_bytes", lambda: 0)
    monkeypatch.setattr(residence, "working_of", lambda *_: WORKING)
    recipe = on_int8(folder, model__memory="100GB")
    needed = memory.check_recipe(recipe, torch.device("cpu"), torch.float32)
    plain = memory.check_recipe(on_int8(folder, model__precision=None), torch.device("cpu"), torch.float32)
    assert needed.total < 10**9 and needed.weights < plain.weights
    seen = []
    make = residence.make_plan
    monkeypatch.setattr(residence, "make_plan", lambda parts, *a: seen.append(parts) or make(parts, *a))
    start(recipe, tmp_path / "roomy")
    kept, units = (sum(f(p) for p in seen[0]) for f in (lambda p: p.kept, lambda p: p.total - p.kept))
    least = WORKING + kept + 2 * max(s for p in seen[0] for own in p.units.values() for s in own)
    assert least < WORKING + kept + units
    training = needed.training + needed.activations
    task = make_task(one_stage(on_int8(folder, model__memory=str(least + training))), tmp_path / "task")
    assert any(p.is_meta for n, p in task.transformer.named_parameters() if "_mod." in n)
    run = Trainer(task.run, task, tmp_path / "task")
    run.run()
    assert all(torch.equal(w, weights(run)[n]) for n, w in weights(whole).items())


def test_a_start_without_modulation_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "start")
    file = tmp_path / "start" / "transformer" / "diffusion_pytorch_model.safetensors"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    quantize(open_weights([file], "transformer"), tmp_path / "small.safetensors",
             schedules=schedules_for(scheduler, [2], [(32, 32)]))  # fmt: skip
    (tmp_path / "small.safetensors").replace(file)
    with pytest.raises(ValueError, match="the modulation weights must be there, which training needs at every noise"):
        start(on_int8(tmp_path / "start"), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__precision": "int3"}, "model.precision must be int8, int4 or left out, got 'int3'"),
        ({"lora__rank": 0}, "lora.rank must be above 0 with model.precision"),
        ({"lora__kind": "dora"}, "lora.kind must be lora or lokr with model.precision"),
        ({"model__compile": True}, "model.compile must be false with model.precision"),
        ({"model__precision": None, "model__memory": "24GB"}, "model.memory must be left out without model.precision"),
        ({"model__memory": "much"}, "recipe: model.memory must be a positive number of bytes .*, got 'much'"),
    ],
)
def test_what_cannot_be(folder, changes, message):
    with pytest.raises(RecipeError, match=message):
        on_int8(folder, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__memory": "1MB"}, "model.memory must be above .*, which training takes, got 1MB"),
        ({"model__memory": "1GB", "lora__targets": ["all"]}, "lora.targets must leave out the modulation .*_mod.1"),
    ],
)
def test_what_cannot_be_with_a_limit(folder, changes, message):
    with pytest.raises(RecipeError, match=message):
        memory.check_recipe(on_int8(folder, **changes), torch.device("cpu"), torch.float32)
