"""The example that teaches the tiny model a sign and an edit, at its smaller size; what judges them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_image_fast.training.evaluation.novelties import is_framed, is_sigil, likeness
from qwen_image_fast.training.synthesis import novelties, tiny
from qwen_image_fast.training.synthesis.generator import make

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_teaches_both(tmp_path, monkeypatch):
    """Too short to learn the sign: what is drawn has come nearer to it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    __import__("lora_demo").main(tmp_path / "out", small=True)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["sign"]["likeness"] > found["sign"]["likeness_before"] + 0.02
    kept = [found[name]["own_test"] for name in ("sign", "frame")]
    assert [test["of"] for test in kept] == [5, 7]
    assert all(0 < test["before"] == sum(before for before, _ in test["tasks"].values()) for test in kept)
    assert (tmp_path / "out" / "sign" / "loras").is_dir() and (tmp_path / "out" / "frame" / "loras").is_dir()
    for name in ("sign", "frame"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.height == 3 * (128 + 22)


def test_the_sign_is_told_from_words():
    pairs = novelties.sigil_colours()
    assert len(pairs) >= 32 and len(set(pairs)) == len(pairs)
    for colour, ground in pairs:
        image = novelties.sigil(colour, ground)
        assert is_sigil(image, colour, ground)
        other = next(c for c, g in pairs if g == ground and c != colour)
        assert not is_sigil(image, other, ground)
    recipe = tiny(size=128, max_lines=1, max_letters=6)
    assert max(likeness(np.asarray(make(recipe, 0, i).image)) for i in range(20)) < 0.5


@pytest.mark.parametrize("fault", ["", "no frame", "another colour", "another picture"])
def test_a_frame_is_seen(fault):
    (before, after, _, colour), (other, *_) = novelties.frame_edits(tiny(size=128), 2, seed=3)
    wrong = next(c for c in ("red", "green", "blue") if c != colour)
    made = {
        "": after, "no frame": before, "another colour": novelties.framed(before, wrong),
        "another picture": novelties.framed(other, colour),
    }[fault]  # fmt: skip
    assert is_framed(made, before, after, colour) == (not fault)
