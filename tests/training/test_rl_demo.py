"""The example that makes the tiny model better by its own pictures, at its smallest size."""

import json
from pathlib import Path

import pytest
from PIL import Image

from qwen_image_fast.training.evaluation.paired import sign_test, won_lost

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_draws_learns_and_says_what_changed(tmp_path, monkeypatch):
    """Too short to learn: what is written down and shown is there, and the model that comes out draws."""
    pytest.importorskip("rapidocr")
    monkeypatch.syspath_prepend(EXAMPLES)
    __import__("rl_demo").main(tmp_path / "out", "tiny", "zh", 1, control=False, whole=False, small=True)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    (readers,) = found["compared"][-1].values()
    assert set(readers) == {"reader at 320 px", "reader at 736 px", "colours"}
    for reader in readers.values():
        assert 0 <= reader["won"] <= 4 and 0 <= reader["p"] <= 1
    assert len(found["compared"]) == len(found["cpu_seconds_a_round"]) == 1
    with Image.open(tmp_path / "out" / "rl-demo.png") as picture:
        assert picture.width > 500
    prompts = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 4 and all(len(p["texts"][0]) == 3 and len(p["boxes"]) == 1 for p in prompts)


def test_the_sign_test():
    assert won_lost([True, False, False], [True, True, False]) == (1, 0)
    assert sign_test(10, 0) == pytest.approx(2 / 1024) and sign_test(0, 0) == 1 and sign_test(3, 3) == 1
    assert sign_test(18, 1) == pytest.approx(2 * 20 / 2**19)
    with pytest.raises(ValueError, match="must judge the same cases, got 1 and 2"):
        won_lost([True], [True, False])
