"""Held-out prompts are the same ones with and without a font: results of before were measured on them."""

import hashlib
import json
import types

import numpy as np
import pytest
from synthesis_helpers import languages, only
from typer.testing import CliRunner

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.cli import app
from qwen_image_fast.training.evaluation import evaluate_text, ocr
from qwen_image_fast.training.evaluation.cases import held_out_cases, held_out_edits
from qwen_image_fast.training.synthesis import FontError, fonts, make, recipe, tiny
from qwen_image_fast.training.synthesis.generator import describe

SETTINGS = {"max_letters": 6, "max_lines": 1}  # those of `evaluate text`, and of the benchmarks of post-training


@pytest.fixture(params=["fonts of this machine", "no Chinese font", "no font"])
def installed(request, monkeypatch):
    found = dict(fonts._installed())
    if request.param != "fonts of this machine":
        latin = {name: path for name, path in found.items() if name.startswith("DejaVu")}
        monkeypatch.setattr(fonts, "_installed", lambda: latin if request.param == "no Chinese font" else {})
    recipe._faces.cache_clear()
    yield request.param
    recipe._faces.cache_clear()


@pytest.mark.parametrize(
    ("language", "count", "seed", "changes", "wanted"),
    [
        ("zh", 200, 0, {}, "36366399c33526fd"),
        ("zh", 200, 0, {"random_strings": 0.0}, "eb693ea0aa13ceae"),
        ("zh", 200, 0, {"other_captions": 1.0}, "45e1f26d6bd69530"),
        ("zh", 480, 1, {}, "a0c6b2b6391355cd"),
        ("zh", 200, 7, {"max_lines": 2}, "3084fe797d41c220"),
        ("en", 200, 0, {}, "c4a7679d941436c1"),
        ("en", 200, 0, {"random_strings": 0.0}, "b73fe9c16b6559b7"),
        ("en", 200, 0, {"other_captions": 1.0}, "fb527dd06b8996d9"),
        ("en", 192, 1, {}, "d3880e82a93784e2"),
    ],
)
def test_held_out_prompts_stay_the_same(installed, language, count, seed, changes, wanted):
    found = held_out_cases(tiny(128, (language,), **(SETTINGS | changes)), count, seed)
    told = [[one.prompt, list(one.texts), one.language, sorted(one.colours.items())] for one in found]
    assert hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()[:16] == wanted


@languages
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_lines": 3, "max_letters": 12, "max_han": 12, "largest_font": 0},  # at times too long
        {"paragraph": 0.5, "rotation": 15.0, "centred": False, "fonts_per_language": 0},
        {"other_captions": 0.5, "natural": 0.5, "max_lines": 3},
    ],
)
def test_a_description_tells_what_the_sample_tells(language, changes):
    drawn = tiny(128, (language,), **changes)
    for index in range(40):
        made, told = make(drawn, 5, index), describe(drawn, 5, index)
        assert (told.caption, told.lines, told.language) == (made.caption, made.lines, made.language)
        assert told.colours == made.colours


def test_samples_that_are_not_pure_are_described_by_drawing_them():
    assert describe(only("shapes"), 0, 3).caption == make(only("shapes"), 0, 3).caption


@pytest.mark.parametrize("installed", ["no Chinese font"], indirect=True)
def test_settings_that_need_a_font_say_so(installed):
    wanted = (
        "evaluate: {} of these settings need a font: no font has .*install a Chinese font, such as Debian's fonts-wqy"
    )
    with pytest.raises(FontError, match=wanted.format("samples")):
        held_out_cases(tiny(128, ("zh",), max_han=12, max_lines=3), 20)
    with pytest.raises(FontError, match=wanted.format("edits of the kind text")):
        held_out_edits(tiny(128, ("zh",)), 1, "text")


@pytest.mark.parametrize("installed", ["no Chinese font"], indirect=True)
@pytest.mark.parametrize("option", [["--languages", "zh"], ["--languages", "zh", "--other-captions"]])
def test_the_command_without_a_chinese_font(installed, option, tmp_path, monkeypatch):
    asked, white = [], np.full((32, 32, 3), 255, np.uint8)

    def draw(cases, first):
        asked.extend(cases)
        return [white] * len(cases)

    monkeypatch.setattr(QwenImagePipeline, "from_pretrained", lambda *args, **kwargs: types.SimpleNamespace())
    monkeypatch.setattr(evaluate_text, "drawn_by", lambda *args, **kwargs: draw)
    monkeypatch.setattr(ocr, "Reader", lambda: types.SimpleNamespace(read=lambda image: []))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["evaluate", "text", "--count", "3", *option, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert len(asked) == 3 and all(one.language == "zh" for one in asked) and (out / "failures.png").exists()
