"""The loop: it learns, resumes bit by bit, and no failure costs more than the steps since the last checkpoint."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_helpers import log_of, small_recipe, start, weights

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.training.engine import checkpoint as checkpoints
from qwen_image_fast.training.engine.ema import EMA
from qwen_image_fast.training.engine.interrupts import Interrupted
from qwen_image_fast.training.engine.optimizer import learning_rate
from qwen_image_fast.training.engine.trainer import TrainingStopped
from qwen_image_fast.training.recipe.run import OptimizerRecipe
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.tasks.flow import FlowTask


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("learned")
    recipe = small_recipe(
        folder, steps=80, batch=8, optimizer__lr=5e-3, optimizer__schedule="cosine", optimizer__ema=0.9,
        log__validate_every=40, log__sample_every=80, log__prompts=["red square, top left"] * 3, log__every=5,
        checkpoint__every=40,
    )  # fmt: skip
    start(recipe, run).run()
    return run


def test_the_loss_falls(learned):
    losses, held_out = log_of(learned), log_of(learned, "validation_loss")
    assert sum(losses[-4:]) / 4 < 0.7 * sum(losses[:2]) / 2
    assert held_out[-1] < held_out[0]


def test_logs_and_samples_are_there(learned):
    lines = [json.loads(line) for line in (learned / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["number"]) for line in lines] == [(step, n) for step in (0, 80) for n in range(3)]
    assert all((learned / "samples" / line["file"]).stat().st_size > 0 for line in lines)
    assert list((learned / "tensorboard").iterdir())
    first = json.loads((learned / "log.jsonl").read_text().splitlines()[0])
    assert {"loss", "grad_norm", "lr", "images_per_s", "tokens_per_s", "data_wait", "memory_gb"} <= first.keys()
    by_noise = [value for name, value in first.items() if name.startswith("loss_noise_")]
    assert len(by_noise) > 1 and min(by_noise) < first["loss"] < max(by_noise)


def test_the_result_is_a_pipeline_with_the_averaged_weights(learned):
    pipe = QwenImagePipeline.from_pretrained(learned / "model")
    image = pipe("red square", height=32, width=32, num_inference_steps=2, seed=0, progress=False).images[0]
    assert image.size == (32, 32)
    state = checkpoints.load(checkpoints.latest(learned / "checkpoints"))
    average = state.ema["transformer.proj_out.weight"]
    assert torch.equal(pipe.transformer.proj_out.weight, average)
    assert not torch.equal(average, state.weights["transformer.proj_out.weight"])
    ours = pipe.text_encoder.state_dict()["language_model.norm.weight"]
    assert torch.equal(ours, state.ema["text_encoder.language_model.norm.weight"])


def test_the_curve_of_fused_and_reference_ops_is_one(folder, tmp_path):
    curves = []
    for name, plain in (("fused", False), ("plain", True)):
        start(small_recipe(folder, steps=30, reference_ops=plain, checkpoint__every=30), tmp_path / name).run()
        curves.append(torch.tensor(log_of(tmp_path / name)))
    assert ((curves[0] - curves[1]).abs() / curves[1]).max() < 1e-4


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {helpers!r})
torch.set_num_threads({threads})
from trainer_helpers import small_recipe, start
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.tasks.flow import FlowTask

class Deadly(Squares):
    def sample(self, seed, index):
        if index == 32:  # the first of the ninth step
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(seed, index)

start(small_recipe({folder!r}, **{changes!r}), Path({run!r}), Deadly(32)).run()
"""
RUN = {"steps": 10, "checkpoint__every": 3, "optimizer__schedule": "cosine", "optimizer__warmup": 2, "accumulate": 1}


def test_a_killed_run_resumes_bit_by_bit(folder, tmp_path):
    whole = start(small_recipe(folder, **RUN), tmp_path / "whole")
    whole.run()
    run = tmp_path / "killed"
    script = KILLED.format(
        helpers=str(Path(__file__).parent), threads=torch.get_num_threads(), folder=str(folder), changes=RUN,
        run=str(run),
    )  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(log_of(run)) == 8
    assert [p.name for p in checkpoints.checkpoints(run / "checkpoints")] == ["step-00000003", "step-00000006"]
    (run / "checkpoints" / ".step-00000009-1").mkdir()  # what a kill in the middle of a checkpoint leaves

    resumed = start(small_recipe(folder, **RUN), run, resume=True)
    assert resumed.step == 6
    resumed.run()
    assert_same(weights(whole), weights(resumed))
    assert_same(whole.ema.average, resumed.ema.average)
    assert_same(whole.optimizer.state(), resumed.optimizer.state())
    assert log_of(tmp_path / "whole") == log_of(run)
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("where", ["in a step", "in a sample"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_learned(folder, tmp_path, monkeypatch, number, where):
    """And the run goes on as if it had never come."""
    changes = {**RUN, "checkpoint__every": 100, "log__sample_every": 5, "log__prompts": ["red square"], "lora__rank": 2}
    recipe = small_recipe(folder, model__train_text_encoder=False, **changes)
    whole = start(recipe, tmp_path / "whole")
    whole.run()

    class Interrupting(Squares):
        def sample(self, seed, index):
            if index == 4 * 4 and where == "in a step":  # the first of the fifth step
                os.kill(os.getpid(), number)
            return super().sample(seed, index)

    def never_done():
        os.kill(os.getpid(), number)
        raise AssertionError("pictures are drawn on")

    if where == "in a sample":
        monkeypatch.setattr(FlowTask, "samples", lambda task: never_done() if run_of[0].step else [])
    before, run = signal.getsignal(number), tmp_path / "stopped"
    run_of = [start(recipe, run, Interrupting(32))]
    with pytest.raises(Interrupted) as end:
        run_of[0].run()
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    assert (end.value.number, end.value.step, end.value.steps) == (number, 5, 10)
    assert end.value.kept == [run / "checkpoints" / "step-00000005", run / "loras" / "step-00000005.safetensors"]
    assert not (run / "model").exists()
    resumed = start(recipe, run, resume=True)
    assert resumed.step == 5
    resumed.run()
    assert_same(weights(whole), weights(resumed))
    assert_same(whole.ema.average, resumed.ema.average)
    assert_same(whole.optimizer.state(), resumed.optimizer.state())


STOPPED = """
import sys
sys.path.insert(0, {helpers!r})
from trainer_helpers import small_recipe, start
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.tasks.flow import FlowTask
from pathlib import Path
import os, signal

class Stubborn(Squares):
    def sample(self, seed, index):
        if index == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.{second})
        return super().sample(seed, index)

start(small_recipe({folder!r}), Path({run!r}), Stubborn(32)).run()
"""


@pytest.mark.parametrize("second, kept", [("SIGINT", False), ("SIGTERM", True)])
def test_a_second_interrupt_ends_at_once(folder, tmp_path, second, kept):
    script = STOPPED.format(
        helpers=str(Path(__file__).parent), folder=str(folder), run=str(tmp_path / "run"), second=second
    )
    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert ("stopped at once" in ended.stderr) != kept
    assert (ended.returncode == 130) != kept, ended.stderr
    assert (checkpoints.latest(tmp_path / "run" / "checkpoints") is not None) == kept


def test_only_the_newest_checkpoints_stay(folder, tmp_path):
    start(small_recipe(folder, steps=5, checkpoint__every=1, checkpoint__keep=2), tmp_path).run()
    names = [p.name for p in checkpoints.checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000005"]


def test_a_full_disk_keeps_the_checkpoint_before(folder, tmp_path, monkeypatch):
    trainer = start(small_recipe(folder), tmp_path)
    (kept,) = trainer.save()
    before = (kept / "state.safetensors").read_bytes()
    trainer.train_step([trainer.task.maker.batch(0, 0)])

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"the disk is full: the checkpoint of step 1 was not written, .*step-00000000"):
        trainer.save()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]
    assert (kept / "state.safetensors").read_bytes() == before
    assert start(small_recipe(folder), tmp_path, resume=True).step == 0


class Poisoned(Squares):
    """Marks sample 9, the second of step 2."""

    def sample(self, seed, index):
        made = super().sample(seed, index)
        made.caption = "the bad one" if index == 9 else made.caption
        return made


def test_a_loss_that_is_not_finite_stops_and_names_the_sample(folder, tmp_path):
    trainer = start(small_recipe(folder, data__text_dropout=0.0), tmp_path, Poisoned(32))
    make = trainer.task.maker.batch

    def batch(step, micro):
        raws = make(step, micro)
        for raw in raws:
            if raw.caption == "the bad one":
                raw.noise[0, 0] = float("nan")
        return raws

    trainer.task.maker.batch = batch
    with pytest.raises(TrainingStopped) as error:
        trainer.run()
    words = str(error.value)
    assert "the loss is nan in the batch of step 2, micro-batch 0, sample 9 (t2i, caption 'the bad one'" in words
    assert "the last good checkpoint is" in words and "step-00000002" in words
    state = checkpoints.load(checkpoints.latest(tmp_path / "checkpoints"))
    assert all(w.isfinite().all() for w in state.weights.values())


def test_a_folder_in_use_and_a_changed_recipe_are_refused(folder, tmp_path):
    recipe = small_recipe(folder)
    start(recipe, tmp_path).save()
    with pytest.raises(FileExistsError, match="already has step-00000000; resume it .* or choose another folder"):
        start(recipe, tmp_path)
    changed = small_recipe(folder, optimizer__lr=0.5)
    with pytest.raises(
        ValueError, match=r"the recipe is not the one of .*: optimizer.lr: 0.002 -> 0.5; --allow-changes"
    ):
        start(changed, tmp_path, resume=True)
    start(changed, tmp_path, resume=True, allow_changes=True)
    with pytest.raises(ValueError, match="model.train_text_encoder must stay True, got False"):
        frozen = small_recipe(folder, model__train_text_encoder=False)
        start(frozen, tmp_path, resume=True, allow_changes=True)


def test_accumulated_micro_batches_equal_the_large_batch(folder, tmp_path):
    runs = []
    for name, changes in (("whole", {"batch": 8}), ("parts", {"batch": 2, "accumulate": 4})):
        trainer = start(small_recipe(folder, **changes), tmp_path / name)
        maker = trainer.task.maker
        trainer.train_step([maker.batch(0, m) for m in range(trainer.recipe.accumulate)])
        runs.append(weights(trainer))
    for name, w in runs[0].items():
        torch.testing.assert_close(w, runs[1][name], rtol=1e-4, atol=5e-5, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__gradient_checkpointing": True},
        {"optimizer__name": "muon"},
        {"model__dtype": "bfloat16"},
        {"data__tasks": {"t2i": 1.0, "ti2i": 1.0, "recon": 1.0}, "data__buckets": [[32, 32], [48, 32]]},
        {"producers__backend": "processes"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_switch_trains_and_resumes(folder, tmp_path, changes):
    recipe = small_recipe(folder, steps=3, checkpoint__every=2, checkpoint__keep=5, **changes)
    whole = start(recipe, tmp_path)
    whole.run()
    checkpoints_there = checkpoints.checkpoints(tmp_path / "checkpoints")
    for late in checkpoints_there[1:]:
        (late / "trainer.json").unlink()  # no longer a checkpoint
    resumed = start(recipe, tmp_path, resume=True)
    assert resumed.step == 2
    resumed.train_step([resumed.task.maker.batch(2, 0)])
    assert_same(weights(whole), weights(resumed))


def test_workers_and_checkpointing_change_nothing(folder, tmp_path):
    plain = start(small_recipe(folder, steps=2), tmp_path / "plain")
    plain.run()
    for name, changes in (
        ("workers", {"producers__backend": "processes", "producers__count": 2}),
        ("again", {"model__gradient_checkpointing": True}),
    ):
        other = start(small_recipe(folder, steps=2, **changes), tmp_path / name)
        other.run()
        assert_same(weights(plain), weights(other))


def test_a_16_bit_model_has_float32_master_weights(folder, tmp_path):
    trainer = start(small_recipe(folder, model__dtype="bfloat16", optimizer__lr=1e-6), tmp_path)
    before = weights(trainer)["transformer.img_in.weight"]
    trainer.train_step([trainer.task.maker.batch(0, 0)])
    after, rounded = weights(trainer)["transformer.img_in.weight"], trainer.parameters["transformer.img_in.weight"]
    assert after.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert (after != before).float().mean() > 0.99  # far below the rounding step of bfloat16
    assert torch.equal(after.bfloat16(), rounded)


def test_ema_is_its_formula():
    weight = torch.zeros(3)
    ema, expected = EMA({"w": weight}, 0.5), torch.zeros(3)
    for n in range(12):
        weight += 1 + n
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(ema.average["w"], expected)
    with ema.swapped({"w": weight}):
        assert torch.equal(weight, ema.average["w"])
    assert weight[0] == sum(range(1, 13))


def test_learning_rates():
    recipe = OptimizerRecipe(lr=1.0, warmup=4, schedule="cosine", final_lr=0.1)
    rates = [learning_rate(recipe, s, 14) for s in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    assert learning_rate(OptimizerRecipe(lr=0.3), 99, 100) == 0.3


def test_resuming_says_where_it_goes_on(folder, tmp_path, capsys):
    start(small_recipe(folder, steps=2), tmp_path, resume=True).run()
    assert "no checkpoint to resume: begins at step 0" in capsys.readouterr().err
    start(small_recipe(folder, steps=3), tmp_path, resume=True, allow_changes=True).run()
    assert "goes on after step 2" in capsys.readouterr().err
