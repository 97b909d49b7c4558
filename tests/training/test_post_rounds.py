"""Runs of rounds: what they learn from, that they go on bit for bit, and what ends them."""

import json
import threading

import numpy as np
import post_helpers
import pytest
import torch
from post_helpers import KINDS, JudgeServer, post_recipe, post_task, start_post
from trainer_helpers import log_of, weights

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.training.engine import checkpoint as checkpoints
from qwen_image_fast.training.engine.trainer import Trainer, TrainingStopped
from qwen_image_fast.training.recipe.curriculum import build_curriculum
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.rollout.prompts import check_collecting
from qwen_image_fast.training.sources.survey import sources_of
from qwen_image_fast.training.tasks.post import PostTask


class Killed(BaseException):
    """Stands for a kill: nothing in a run catches it."""


@pytest.fixture
def serve_judge():
    server = JudgeServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_killed_while_it_draws_goes_on_bit_for_bit(folder, tmp_path, monkeypatch, kind):
    """The kill comes in the second round's drawing; the run goes on in the middle of the first one, at step 2."""
    recipe = post_recipe(folder, kind, checkpoint__every=2, guards={"every": 1, "count": 2, "dead": 0, "held_out": 0,
                         "edges": 0, "entropy": 0})  # fmt: skip
    whole = start_post(recipe, tmp_path / "whole")
    whole.run()
    bright, calls = post_helpers.bright, []

    def deadly(pictures, asked):
        calls.append(len(pictures))
        if len(calls) == 4:  # a look and a round come before: the pictures of the second round
            raise Killed
        return bright(pictures, asked)

    monkeypatch.setattr(post_helpers, "bright", deadly)
    with pytest.raises(Killed):
        start_post(recipe, tmp_path / "killed").run()
    monkeypatch.setattr(post_helpers, "bright", bright)
    resumed = start_post(recipe, tmp_path / "killed", resume=True)
    assert resumed.step == 2
    resumed.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values()))
    for key in ("loss", "reward", "held_out_reward", "drift"):
        assert log_of(tmp_path / "whole", key) == log_of(tmp_path / "killed", key)
    assert log_of(tmp_path / "whole", "drift")[0] == 0 < log_of(tmp_path / "whole", "drift")[1]


def test_each_kind_begins_where_it_must(folder, tmp_path):
    """In whole runs: the first loss of a DPO round is ln 2, the first ratio of a GRPO round 1, NFT has not moved."""
    found = {}
    for kind in ("dpo", "grpo", "nft"):
        run = tmp_path / kind
        start_post(post_recipe(folder, kind), run).run()
        found[kind] = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found[kind] = [line for line in found[kind] if "loss" in line]
        assert QwenImagePipeline.from_pretrained(run / "model").transformer is not None
    ln2 = torch.tensor(2.0).log().item()
    assert [line["loss"] == ln2 for line in found["dpo"]] == [True, False, False] * 2
    assert [line["ratio_most"] == 0 for line in found["grpo"]] == [True, False, False] * 2
    assert [line["kl"] == 0 for line in found["grpo"]][:2] == [True, False]
    assert [line["deviation"] == 0 for line in found["nft"]] == [True, False, False] * 2


@pytest.mark.parametrize("kind", ["nft", "grpo"])
def test_guidance_of_the_rollout_alone(folder, tmp_path, kind):
    """The ratio is that of the update's guidance, and begins at 1 all the same."""
    start_post(post_recipe(folder, kind, steps=2, rollout__guidance=3.0), tmp_path / "run").run()
    if kind == "grpo":
        assert log_of(tmp_path / "run", "ratio_most")[0] == 0 < log_of(tmp_path / "run", "ratio_most")[1]


def test_adapters_learn_alone(folder, tmp_path):
    recipe = post_recipe(folder, "dpo", lora={"rank": 2}, steps=3)
    trainer = start_post(recipe, tmp_path / "run")
    trainer.run()
    assert all("lora" in name for name in trainer.task.policies.kept["round"])
    assert log_of(tmp_path / "run")[0] == torch.tensor(2.0).log().item()
    assert (tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_the_first_pictures_choose_the_prompts(folder, tmp_path, monkeypatch):
    """Two pictures of each prompt; the third only where these two differ. Here those of red squares never do."""

    def choosy(pictures, asked):
        return [0.5 if "red" in a.prompt else float(np.mean(p)) for p, a in zip(pictures, asked)]

    monkeypatch.setattr(post_helpers, "bright", choosy)
    recipe = post_recipe(folder, "dpo", steps=1, rollout__first=2, rollout__count=8)
    trainer = start_post(recipe, tmp_path / "run")
    trainer.run()
    prompts = trainer.task.giver.round(0)
    red = sum("red" in prompt.caption for prompt in prompts)
    assert 0 < red < 8
    assert log_of(tmp_path / "run", "pictures") == [8 * 2 + (8 - red)]
    assert log_of(tmp_path / "run", "dead_groups") == [pytest.approx(red / 8)]


def test_a_round_that_teaches_nothing_is_said(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(post_helpers, "bright", lambda pictures, asked: [1.0] * len(pictures))
    start_post(post_recipe(folder, "nft", steps=1), tmp_path / "run").run()
    said = " ".join(capsys.readouterr().err.split())
    assert "round 0: nothing is learnt from its 12 pictures, as those of each prompt have one reward" in said
    assert " pictures 12 learnt_from 0 " in said
    assert "nothing was learnt in any round: the model that is written is the one of the start" in said


def test_one_round_that_teaches_is_enough(folder, tmp_path, monkeypatch, capsys):
    rewards = iter([1.0] * 12 + [0.1 * (i % 3) for i in range(12)])
    monkeypatch.setattr(post_helpers, "bright", lambda pictures, asked: [next(rewards) for _ in pictures])
    start_post(post_recipe(folder, "nft", steps=2, rollout__updates=1), tmp_path / "run").run()
    said = " ".join(capsys.readouterr().err.split())
    assert "round 0: nothing is learnt" in said and "in any round" not in said


def test_a_file_of_fewer_prompts_than_a_round_draws_is_said(folder, tmp_path):
    prompts, said = tmp_path / "prompts.txt", []
    prompts.write_text("a\nb\nc\n")
    recipe = post_recipe(folder, "nft", data__source="", rollout__prompts=str(prompts), guards__every=0)
    for count in (3, 4):
        recipe.rollout.count = count
        check_collecting(recipe, tmp_path, said.append)
    assert [s.replace(str(prompts), "FILE") for s in said] == [
        "FILE has 3 prompts to learn from; a round draws 4 (rollout.count), so some are drawn more than once, "
        "from other noise"
    ]


def test_micro_batches_are_parts_of_a_batch(folder, tmp_path):
    """A batch of four and two of two: the same samples, the same numbers in the log, means and not the last one's."""
    for name, changes in (("one", {"batch": 4}), ("two", {"batch": 2, "accumulate": 2})):
        start_post(post_recipe(folder, "nft", steps=2, levels=1, **changes), tmp_path / name).run()
    for key in ("loss", "deviation", "from_start"):
        assert log_of(tmp_path / "one", key) == pytest.approx(log_of(tmp_path / "two", key), rel=1e-4)


def test_stages_of_several_kinds_are_one_run(folder, tmp_path):
    """Flow matching, then DPO, then GRPO; stopped in the second and resumed."""
    common = {"device": "cpu", "model": {"folder": str(folder), "train_text_encoder": False}, "batch": 3,
              "data": {"source": "squares", "options": {"size": 32}, "buckets": [[32, 32]]},
              "optimizer": {"ema": 0.0, "lr": 1e-3}, "checkpoint": {"every": 3, "keep": 9},
              "log": {"every": 1}}  # fmt: skip
    rounds = {"count": 2, "group": 3, "updates": 2, "steps": 3}
    after = {"rewards": post_helpers.BRIGHT, "guards": {"every": 0}, "rollout": rounds}
    tree = {**common, "stages": [
        {"name": "sft", "steps": 2}, {"name": "dpo", "kind": "dpo", "steps": 2, **after},
        {"name": "grpo", "kind": "grpo", "steps": 2, "window": 1, "within": 2, **after},
    ]}  # fmt: skip

    def trainer(name, **options):
        run = build_curriculum(tree)
        task = PostTask(run.stages[0].recipe, tmp_path / name, run=run, sources=sources_of(run))
        return Trainer(run, task, tmp_path / name, **options)

    whole = trainer("whole")
    whole.run()
    found = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [("implicit_accuracy" in line, "ratio_mean" in line) for line in found if "loss" in line] == [
        (False, False), (False, False), (True, False), (True, False), (False, True), (False, True)
    ]  # fmt: skip
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "checkpoints")
    (tmp_path / "again").mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / "again" / "checkpoints")
    for path in checkpoints.checkpoints(tmp_path / "again" / "checkpoints")[1:]:
        path.rename(tmp_path / path.name)
    resumed = trainer("again", resume=True)
    assert resumed.step == 2 or resumed.step == 3
    resumed.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values()))


@pytest.mark.parametrize(
    "reward, sentence",
    [
        (lambda pictures: [float("nan")] * len(pictures), "must be a finite number, got nan"),
        (lambda pictures: [1.0], "must give a number for each picture, got 1 for"),
        (lambda pictures: "good", "must give a number for each picture"),
        (lambda pictures: [0.25] * len(pictures), "the same for all pictures of 3 rounds"),
        (
            lambda pictures: {}["score"],
            "post_helpers:bright raised KeyError: 'score' .line .* of .*mend it, then resume",
        ),
    ],
)
def test_what_is_no_reward_ends_the_run(folder, tmp_path, monkeypatch, reward, sentence):
    monkeypatch.setattr(post_helpers, "bright", lambda pictures, asked: reward(pictures))
    recipe = post_recipe(folder, "dpo", rollout__updates=1, guards={"every": 0, "dead": 0})
    with pytest.raises(TrainingStopped, match=sentence) as stopped:
        start_post(recipe, tmp_path / "run").run()
    assert "the last good checkpoint is" in str(stopped.value)


def test_a_judge_that_hangs_and_then_answers(folder, tmp_path, serve_judge):
    """It falls silent within the second round: the run ends with a sentence, and the resumed one, which asks for what
    is missing alone, ends as one whose judge never hung."""
    judge = {"model": "m", "endpoint": serve_judge.url, "timeout": 0.5, "attempts": 1, "parallel": 1, "high": 255}
    recipe = post_recipe(folder, "nft", rewards=[{"kind": "judge", "options": judge}])
    whole = start_post(recipe, tmp_path / "whole")
    whole.run()
    assert serve_judge.asked == 24
    serve_judge.silent_from = 24 + 15
    with pytest.raises(TrainingStopped, match="no score after 1 tries: .*resume when it answers; .*good checkpoint is"):
        start_post(recipe, tmp_path / "run").run()
    serve_judge.silent_from = 1000
    known, serve_judge.asked = len((tmp_path / "run" / "judged.jsonl").read_text().splitlines()), 0
    resumed = start_post(recipe, tmp_path / "run", resume=True)
    resumed.run()
    assert known == 15 and serve_judge.asked == 24 - known
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values()))


def test_a_file_that_changed_is_said(folder, tmp_path):
    """A resumed run learns from what the file says now; that it is not what it was stands in the log."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    changes = {"data__source": None, "data__options": {}, "rollout__prompts": str(prompts), "steps": 3,
               "checkpoint__every": 1, "data__buckets": [[32, 32]]}  # fmt: skip
    start_post(post_recipe(folder, "nft", **changes), tmp_path / "run").run()
    for text, told in (("a\nb\nc\n", 0), ("a\nb\nd\n", 1)):
        prompts.write_text(text)
        resumed = start_post(post_recipe(folder, "nft", **{**changes, "steps": 4}), tmp_path / "run",
                             resume=True, allow_changes=True)  # fmt: skip
        assert len([note for note in resumed.task.said() if "prompts.txt is not what it was" in note]) == told


def test_another_reward_is_not_resumed_with(folder, tmp_path):
    start_post(post_recipe(folder, "nft", steps=2), tmp_path / "run").run()
    other = post_recipe(folder, "nft", rewards=[{"kind": "colour"}])
    with pytest.raises(ValueError, match="rewards.*colour.*--allow-changes"):
        Trainer(other, post_task(post_recipe(folder, "nft"), tmp_path / "run"), tmp_path / "run", resume=True)


REFUSED = [
    ({"rollout__group": 1}, "rollout.group must be 2 or more: a picture alone has none to be better than, got 1"),
    ({"rollout__first": 3}, "rollout.first must be 0, or 2 or more and below rollout.group, got 3"),
    ({"rewards": []}, "rewards must name at least one"),
    ({"rewards": [{"kind": "beauty"}]}, "rewards.0.kind must be of text, colour, layout, edit, function, judge"),
    ({"rewards": [{"kind": "text", "options": {"sides": 3}}]}, "there is no field rewards.0.options.sides"),
    ({"rewards": [{"kind": "judge"}]}, "rewards.0.options.endpoint must begin with http:// or https://"),
    ({"rewards": [{"kind": "function", "options": {"name": "f"}}]}, 'rewards.0.options.name must be "package.module'),
    ({"model__train_text_encoder": True}, "model.train_text_encoder must be false for kind grpo"),
    ({"optimizer__ema": 0.9}, "optimizer.ema must be 0"),
    ({"window": 0}, "window must be 1 or more: without stochastic steps nothing is learnt, got 0"),
    ({"window": 3}, "window must be at most within, 2, got 3"),
    ({"within": 3}, "within must be below rollout.steps, 3: the last step has no noise, got 3"),
    ({"rollout__dtype": "bfloat16"}, "rollout.dtype must be auto for kind grpo"),
    ({"pairs": "p.jsonl"}, "pairs must be empty for kind grpo: it draws its pictures"),
    ({"beta": 1.0}, "there is no field beta"),
    ({"model__folder": "new"}, "model.folder must name a trained model for kind grpo"),
]


@pytest.mark.parametrize("changes, sentence", REFUSED, ids=[sentence[:24] for _, sentence in REFUSED])
def test_what_is_refused(folder, changes, sentence):
    with pytest.raises(RecipeError) as refused:
        post_recipe(folder, "grpo", **changes)
    assert sentence in str(refused.value)


def test_a_function_that_is_not_there(folder, tmp_path):
    for name, sentence in (("nowhere:f", "there is no module nowhere"), ("math:floors", "has no floors"),
                           ("math:pi", "must be a function, got float")):  # fmt: skip
        recipe = post_recipe(folder, "nft", rewards=[{"kind": "function", "options": {"name": name}}])
        with pytest.raises(RecipeError, match=sentence):
            post_task(recipe, tmp_path)
