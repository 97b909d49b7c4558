"""The example that makes the tiny model better by its own pictures, at its smallest size."""

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fontTools", reason="glyph coverage is read by fontTools")

from qwen_image_fast.training.evaluation.paired import sign_test, won_lost
from qwen_image_fast.training.evaluation.tiny_cases import pictures
from qwen_image_fast.training.rewards.reward import Asked

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_draws_learns_and_says_what_changed(tmp_path, monkeypatch):
    """Too short to learn: what is written down and shown is there, and the model that comes out draws."""
    monkeypatch.syspath_prepend(EXAMPLES)
    __import__("rl_demo").main(tmp_path / "out", "tiny", 1, control=False, small=True)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    (compared,) = found["compared"]
    assert list(compared) == ["single", "two", "counting", "position", "text", "all shapes"]
    for task in compared.values():
        assert 0 <= task["won"] <= 4 and 0 <= task["p"] <= 1
    assert len(found["cpu_seconds_a_round"]) == len(found["pairs"]) == 1
    with Image.open(tmp_path / "out" / "rl-demo.png") as picture:
        assert picture.width > 500


def test_prompts_that_are_judged_are_not_trained_on(tmp_path, monkeypatch):
    """Each once, of all tasks in turn; the reward knows what they ask for."""
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = __import__("rl_demo")
    files = demo.write_prompts(tmp_path, 2, 40)
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(own) for own in lines] == [40, 40]
    prompts = [line["prompt"] for own in lines for line in own]
    judged = [one for task in demo.SHAPES for one in pictures(task, demo.JUDGED)]
    assert len(set(prompts)) == 80 and not set(prompts) & {one.prompt for one in judged}
    assert [len(line["things"]) > 1 for line in lines[1][:8]] == [False, True, True, True] * 2
    one = judged[-1]
    asked = [Asked(one.prompt, fields={"things": [list(thing) for thing in one.things]})] * 2
    right, wrong = demo.outlines([one.right, judged[0].right], asked)
    assert right == 1 and wrong < 0.5


def test_most_prompts_are_of_what_is_drawn_worst(tmp_path, monkeypatch):
    """Of the few single shapes the same ones in every round, each once in a round."""
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = __import__("rl_demo")
    for wrong, single, of in (([9, 1, 0, 0], demo.SINGLE, 107), ([0, 0, 0, 36], 4, 160)):
        files = demo.write_prompts(tmp_path, 2, 160, wrong)
        for file in files:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(lines) == len({line["prompt"] for line in lines}) == of
            assert sum(len(line["things"]) == 1 for line in lines) == single


def test_the_sign_test():
    assert won_lost([True, False, False], [True, True, False]) == (1, 0)
    assert sign_test(10, 0) == pytest.approx(2 / 1024) and sign_test(0, 0) == 1 and sign_test(3, 3) == 1
    assert sign_test(18, 1) == pytest.approx(2 * 20 / 2**19)
    with pytest.raises(ValueError, match="must judge the same cases, got 1 and 2"):
        won_lost([True], [True, False])
