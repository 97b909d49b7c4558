"""Mixtures and stages: who comes when, what is carried over, and a resume in the middle of any stage."""

import collections
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_pictures import noise
from source_helpers import write_pairs
from trainer_helpers import log_of, small_tree, weights

from qwen_image_fast.training.batches.mixture import BLOCK, Order, Segment, slots
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.engine import checkpoint as checkpoints
from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.recipe.captions import CaptionsRecipe
from qwen_image_fast.training.recipe.curriculum import Change, build_curriculum
from qwen_image_fast.training.recipe.data import PartRecipe
from qwen_image_fast.training.recipe.fields import RecipeError, set_dotted
from qwen_image_fast.training.run import make_task, train
from qwen_image_fast.training.sources.make import make_source


def curriculum(folder, /, **changes):
    """Squares at 32 px, then two kinds at 32 and 48 px with another learning rate and the average begun anew."""
    tree = small_tree(folder)
    tree["stages"] = [
        {"name": "small", "steps": 3},
        {
            "name": "mixed", "steps": 3, "batch": 2, "accumulate": 2, "carry": {"ema": False},
            "optimizer": {"lr": 1e-3, "warmup": 2},
            "data": {
                "mixture": [
                    {"name": "same", "source": "squares", "options": {"size": 32}, "weight": 3},
                    {"name": "large", "source": "squares", "options": {"size": 48}, "tasks": {"ti2i": 1.0}},
                ],
                "buckets": [[32, 32], [48, 48]],
            },
        },
    ]  # fmt: skip
    for name, value in changes.items():
        set_dotted(tree, name.replace("__", "."), value)
    return build_curriculum(tree)


def begin(run, folder, **options):
    return Trainer(run, make_task(run, folder), folder, **options)


def test_every_part_counts_on_through_changes_and_stages():
    order = Order(3, [Segment(0, (("a", 1.0),)), Segment(70, (("a", 3.0), ("b", 1.0))), Segment(2500, (("b", 1.0),))])
    seen = collections.defaultdict(list)
    for sample in range(2700):
        key, position = order.place(sample)
        seen[key].append(position)
    assert all(positions == list(range(len(positions))) for positions in seen.values())
    in_blocks = [order.place(sample)[0] for sample in range(70, 70 + 2 * BLOCK)]
    assert in_blocks.count("b") == BLOCK / 2
    assert in_blocks[:BLOCK] != in_blocks[BLOCK:]


def test_slots_add_up_and_leave_nobody_out():
    assert slots([1, 1, 1]) == (334, 333, 333)
    assert slots([1e-9, 1, 0]) == (1, 999, 0)


def test_changes_last_until_the_end_of_their_stage(folder):
    run = curriculum(folder)
    changes = (Change(1, (("squares", 2.0),)), Change(4, (("same", 0.0), ("large", 5.0))))
    assert run.weights(3, changes) == {"same": 3, "large": 1}
    assert run.weights(4, changes) == {"same": 0, "large": 5}
    assert [run.sample_of(step) for step in (0, 2, 3, 4)] == [0, 8, 12, 16]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    trainer = begin(curriculum(folder), tmp_path_factory.mktemp("whole"))
    trainer.run()
    return trainer


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_resumes_in_any_stage_bit_by_bit(folder, tmp_path, whole, step):
    run = curriculum(folder, checkpoint__every=1, checkpoint__keep=9)
    stopped = begin(run, tmp_path)
    look = stopped._look
    stopped._look = lambda log, last: look(log, last) if stopped.step <= step else 1 / 0
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    resumed = begin(run, tmp_path, resume=True)
    assert resumed.step == step
    resumed.run()
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(whole).items())
    assert all(torch.equal(w, resumed.ema.average[name]) for name, w in whole.ema.average.items())
    assert log_of(tmp_path) == log_of(whole.folder)
    assert log_of(tmp_path, "stage") == [0, 0, 0, 1, 1, 1]


def test_a_stage_takes_over_what_carry_says(folder, tmp_path, whole):
    assert log_of(whole.folder, "lr") == pytest.approx([2e-3, 2e-3, 2e-3, 5e-4, 1e-3, 1e-3])
    assert whole.ema.updates == 3
    state = next(name for name in whole.optimizer.state() if name.endswith("step"))
    assert whole.optimizer.state()[state] == 6
    fresh = begin(curriculum(folder, stages__1__carry={"optimizer": False}), tmp_path)
    fresh.run()
    assert fresh.ema.updates == 6
    assert fresh.optimizer.state()[state] == 3


def test_the_mixture_changes_from_a_recorded_step_on(folder, tmp_path):
    run = curriculum(folder, checkpoint__every=1, producers__ahead=1)
    trainer = begin(run, tmp_path)
    step = trainer.train_step

    def train_step(batches):
        if trainer.step == 3:  # step 4 is ordered already
            (tmp_path / "mixture.yaml").write_text("{same: 0}")
        seen.append([raw.task for batch in batches for raw in batch])
        return step(batches)

    seen, trainer.train_step = [], train_step
    trainer.run()
    assert seen[-1] == ["ti2i"] * 4
    assert json.loads((tmp_path / "mixture.jsonl").read_text()) == {"step": 5, "weights": {"same": 0.0, "large": 1.0}}
    (checkpoints.latest(tmp_path / "checkpoints") / "trainer.json").unlink()
    again = begin(run, tmp_path, resume=True)
    assert again.step == 5
    again.run()
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(trainer).items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": []}, "stages must be a list of one stage or more, got []"),
        ({"stages__1__seed": 3}, "seed must stand above the stages: it is one for the whole run (stage 1)"),
        ({"stages__1__model": {"folder": "other"}}, "model.folder must stand above the stages"),
        (
            {"stages__1__optimizer__name": "muon"},
            "carry.optimizer must be false where optimizer.name changes",
        ),
        ({"stages__1__data__mixture__1__name": "same"}, "data.mixture must have parts of different names"),
        ({"stages__2__steps": 3}, "stages.2.steps must have a number from 0 to 1 instead of 2"),
        ({"stages__0__stps": 3}, "there is no field stps; did you mean steps? (stage 0)"),
    ],
)
def test_what_is_refused(folder, changes, sentence):
    with pytest.raises(RecipeError) as error:
        curriculum(folder, **changes)
    assert sentence in str(error.value)


def shards(folder, count=12):
    records = [
        Record(noise(i, 40, 40), {"raw": f"raw {i}", "fused": f"fused {i}"}, category="Nature" if i % 2 else "People",
               metadata={"score": i, "text_language": "English" if i % 3 else "Non-text"}, origin=f"{i}.png")
        for i in range(count)
    ]  # fmt: skip
    write_shards(records, folder, shard_records=5)
    return str(folder)


def test_shards_give_each_record_once_an_epoch(tmp_path):
    source = make_source(PartRecipe(source=shards(tmp_path)))
    epochs = [[source.sample(0, epoch * 12 + i).origin for i in range(12)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(f"{i}.png" for i in range(12))] * 2
    assert epochs[0] != epochs[1]
    chosen = {"where": {"category": ["Nature"]}, "least": {"score": 3}}
    raw = CaptionsRecipe(weights={"raw": 1.0})
    source = make_source(PartRecipe(source=str(tmp_path), options=chosen, captions=raw))
    assert sorted(source.sample(0, i).caption for i in range(5)) == sorted(f"raw {i}" for i in (3, 5, 7, 9, 11))
    with pytest.raises(RecipeError, match=r"no record of .* is chosen by where \{'category': \['Art'\]\}"):
        make_source(PartRecipe(source=str(tmp_path), options={"where": {"category": ["Art"]}}))


SMALL_EDITS = {"preset": "tiny", "size": 64, "edits": ["text", "colour", "ground"]}


def shrunk(folder, data):
    """The changes that make the report's curriculum small: model, shards, sizes and steps; its stages stay."""
    words, buckets = {"preset": "tiny", "size": 64}, [[32, 32], [32, 48], [48, 32]]
    values = {"device": "cpu", "model.folder": str(folder), "producers.backend": "here", "checkpoint.every": 1,
              "log.every": 1, "log.sample_steps": 2, "log.validation_samples": 1}  # fmt: skip
    for number in range(5):
        stage = f"stages.{number}"
        values |= {f"{stage}.steps": 2, f"{stage}.batch": 2, f"{stage}.data.buckets": buckets}
        values[f"{stage}.data.hold_out"] = 0.3
    values["stages.0.data.source"] = values["stages.1.data.mixture.0.source"] = data
    values |= {"stages.1.data.mixture.1.source": data, "stages.1.data.mixture.2.options": words}
    for number in (2, 3, 4):
        mixture = f"stages.{number}.data.mixture"
        values |= {f"{mixture}.0.source": data, f"{mixture}.1.options": words}
    for number in (3, 4):  # so few samples, that edits must be frequent to be seen
        mixture = f"stages.{number}.data.mixture"
        values |= {f"{mixture}.2.options": SMALL_EDITS, f"{mixture}.2.weight": 5, f"{mixture}.3.weight": 5}
        values[f"{mixture}.3.source"] = str(write_pairs(Path(data).parent / "edits", "folders"))
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


KILLED = """
import os, signal
import torch
from qwen_image_fast.training.run import train
from qwen_image_fast.training.engine.trainer import Trainer

step = Trainer.train_step
def train_step(trainer, batches):
    if trainer.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, batches)
Trainer.train_step = train_step
torch.set_num_threads({threads})
train({name!r}, {changes!r}, {run!r})
"""


def test_the_curriculum_of_the_report_runs_and_goes_on_after_a_kill_in_a_stage(folder, tmp_path, monkeypatch):
    changes, name, tasks = shrunk(folder, shards(tmp_path / "shards")), "curriculum/report", set()
    step = Trainer.train_step

    def train_step(trainer, batches):
        tasks.update(raw.task for batch in batches for raw in batch)
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    whole, one, two = train(name, changes, tmp_path / "one"), tmp_path / "one", tmp_path / "two"
    assert log_of(one, "stage") == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and {"t2i", "ti2i"} <= tasks
    assert len(log_of(one, "validation_loss")) == 5  # at the end of each stage
    lines = [json.loads(line) for line in (one / "samples" / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 2, 4, 6, 8, 10}
    values = {"name": name, "changes": changes, "run": str(two), "threads": torch.get_num_threads()}
    killed = subprocess.run([sys.executable, "-c", KILLED.format(**values)], stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert checkpoints.latest(two / "checkpoints").name == "step-00000007"
    resumed = train(name, changes, two, resume=True)
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(whole).items())
    assert log_of(two) == log_of(one)


def test_what_cannot_be_used_is_left_out_and_written_down(folder, tmp_path):
    where = shards(tmp_path / "shards")
    shard = tmp_path / "shards" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    filters = {"stages": [1], "curation": {"min_side": 16, "min_bytes": 1}, "without": ["nsfw"]}
    tree = small_tree(folder) | {"steps": 3}
    tree["data"] |= {"source": where, "options": {}, "filters": filters}
    trainer = begin(build_curriculum(tree), tmp_path / "run")
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    # Each of the twelve records once, and what stood for the five damaged ones may be damaged too.
    assert len({x["sample"] for x in lines}) == 5 == len({x["origin"] for x in lines})
    assert all("broken_file: the shard shard-00001.tar is damaged" in x["reason"] for x in lines)
    assert sum(log_of(tmp_path / "run", "rejected")) == len(lines)
    tree["data"]["filters"]["curation"]["min_side"] = 50
    maker = make_task(build_curriculum(tree), tmp_path / "other").maker
    with pytest.raises(RecipeError, match=r"1000 samples in a row were rejected, the first of them shard-"):
        maker.batch(0, 0)
