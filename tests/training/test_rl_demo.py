"""The example that makes the tiny model better by its own pictures, at its smallest size."""

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fontTools", reason="glyph coverage is read by fontTools")

from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.evaluation.tiny_cases import pictures
from qwen_image_fast.training.evaluation.tiny_eval import Judged
from qwen_image_fast.training.rewards.reward import Asked

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__("rl_demo")


def test_it_draws_learns_and_says_what_changed(tmp_path, demo, capsys):
    """Too short to learn: what is written down and shown is there, and the model that comes out draws."""
    demo.main(tmp_path / "out", "tiny", 1, control=False, small=True)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["compared"]) == [found["spot"], "all shapes of TinyEval", "its texts"]
    assert found["compared"][found["spot"]] == found["after_a_round"][0]
    for compared in found["compared"].values():
        assert 0 <= compared["won"] <= 4 and 0 <= compared["p"] <= 1
    assert len(found["cpu_seconds_a_round"]) == len(found["pairs"]) == 1
    assert f"{found['spot']}: 2 prompts that are held out, 1 pictures of each" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "rl-demo.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("task", ["single", "two", "counting", "position"])
@pytest.mark.parametrize("shape", ["star", "circle"])
def test_prompts_that_are_judged_are_not_trained_on(tmp_path, demo, task, shape):
    asked, others = demo.Spot(task, shape).prompts()
    judged = {one.prompt for one in pictures(task, demo.JUDGED)}
    assert len(asked) >= demo.LEAST and len(others) >= demo.LEAST
    assert {one.prompt for one in asked} <= judged and not {one.prompt for one in others} & judged
    assert all(shape in one.prompt for one in [*asked, *others])
    file = demo.write_prompts(tmp_path / "prompts.jsonl", others, 100)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 100 and {line["prompt"] for line in lines} <= {one.prompt for one in others}


def test_the_weakest_spot(demo):
    """Of stars alone 6 of 15 are wrong; where no spot was asked for often, the few pictures count."""
    found = []
    for task in demo.SHAPES:
        stars = 0
        for one in pictures(task, demo.JUDGED):
            stars += one.things[0][0] == "star"
            wrong = task == "single" and one.things[0][0] == "star" and stars <= 6
            found.append(Judged(task, one.prompt, "shows a blob" if wrong else None, ()))
    assert demo.weakest([*found, Judged("text", "some text", "reads nothing", ())]) == demo.Spot("single", "star")
    few = [Judged("two", one.prompt, None, ()) for one in pictures("two", 3)]
    few.append(Judged("single", pictures("single", 1)[0].prompt, "shows nothing", ()))
    assert demo.weakest(few) == demo.Spot("single", "star")


def test_the_reward_knows_what_is_asked_for(demo):
    one, other = pictures("two", 2)
    asked = [Asked(one.prompt, fields={"things": [list(thing) for thing in one.things]})] * 2
    right, wrong = demo.outlines([one.right, other.right], asked)
    assert right == 1 and wrong < 0.5


def test_prompts_of_the_benchmark_are_of_all_tasks_in_turn(tmp_path):
    from benchmarks.post_training_shapes import _write_prompts

    lines = [json.loads(line) for line in _write_prompts(tmp_path / "p.jsonl", 40).read_text().splitlines()]
    judged = {one.prompt for task in ("single", "two", "counting", "position") for one in pictures(task, 50)}
    assert len({line["prompt"] for line in lines}) == 40 and not {line["prompt"] for line in lines} & judged
    assert [len(line["things"]) > 1 for line in lines[:8]] == [False, True, True, True] * 2


def test_the_sign_test():
    assert won_lost([True, False, False], [True, True, False]) == (1, 0)
    assert sign_test(10, 0) == pytest.approx(2 / 1024) and sign_test(0, 0) == 1 and sign_test(3, 3) == 1
    assert sign_test(18, 1) == pytest.approx(2 * 20 / 2**19)
    with pytest.raises(ValueError, match="must judge the same cases, got 1 and 2"):
        won_lost([True], [True, False])
