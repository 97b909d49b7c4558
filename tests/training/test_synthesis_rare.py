"""Synthesis aimed at rare characters: the rarer in a table, the more often drawn."""

import collections
import json
import random

import pytest
from synthesis_helpers import needs_chinese
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.synthesis import SynthesisRecipe, fonts, make
from qwen_image_fast.training.synthesis.rare import count_characters, rare_recipe
from qwen_image_fast.training.synthesis.words import HAN_UNIQUE, WordSource

COUNTS = {"的": 10_000, "猫": 100, "鳄": 1, "齉": 0}


def test_weights_grow_as_counts_fall():
    recipe = rare_recipe(COUNTS, power=0.5, limit=50)
    assert recipe["han_weights"] == {"齉": 50.0, "鳄": 50.0, "猫": 10.0, "的": 1.0}
    assert rare_recipe(COUNTS, rarest=2)["han"] == "齉鳄"
    assert rare_recipe(COUNTS, power=1.0, limit=1e6)["han_weights"]["鳄"] == 10_000
    source = SynthesisRecipe.from_dict(recipe).words()
    rng = random.Random(0)
    drawn = collections.Counter("".join(source.text(rng, "zh", 2) for _ in range(3000)))
    for character, weight in recipe["han_weights"].items():
        assert drawn[character] / drawn.total() == pytest.approx(weight / 111, abs=0.02)


def test_without_weights_nothing_else_is_drawn():
    plain, equal = WordSource(), WordSource(weights=(1.0,) * len(HAN_UNIQUE))
    assert plain.random_string(random.Random(3), "zh", 4) == WordSource().random_string(random.Random(3), "zh", 4)
    assert equal.random_string(random.Random(3), "en", 4) == plain.random_string(random.Random(3), "en", 4)
    assert hash(SynthesisRecipe(languages=("zh",), han_weights={"的": 2}))  # a frozen value


@needs_chinese
def test_a_recipe_from_shards_draws_what_fonts_have(tmp_path):
    captions = ["牌子上写着“鳄鱼”", "牌子上写着“上上上”", "no Chinese"]
    write_shards([Record(bytes([n]), {"raw": text}) for n, text in enumerate(captions)], tmp_path / "shards")
    command = ["data", "characters", str(tmp_path / "shards"), "--out", str(tmp_path / "rare.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "7 of 7 characters" in result.output, result.output
    recipe = json.loads((tmp_path / "rare.json").read_text(encoding="utf-8"))
    assert recipe["han_weights"]["鳄"] > recipe["han_weights"]["上"] == 1 and set(recipe["han"]) == set(
        "牌子上写着鳄鱼"
    )
    made = make(SynthesisRecipe.from_dict({**recipe, "sizes": [[96, 96]]}), 0, 0)
    assert set("".join(made.lines)) <= set(recipe["han"])
    with pytest.raises(fonts.FontError, match="no font has the glyphs"):
        make(SynthesisRecipe(languages=("zh",), han="㐀㒰㨃㵘" + "".join(map(chr, range(0x3400, 0x3480)))[1:]), 0, 0)


@pytest.mark.parametrize(
    "table, message",
    [
        ('{"a": 1}', "Chinese characters a count each, got 'a': 1"), ('{"的": -1}', "got '的': -1"),
        ("{}", "there must be a Chinese character"), ("[", "is not JSON"), ("[1]", "an object of counts"),
    ],
)  # fmt: skip
def test_tables_that_mean_nothing(tmp_path, table, message):
    (tmp_path / "counts.json").write_text(table, encoding="utf-8")
    result = CliRunner().invoke(app, ["data", "characters", str(tmp_path / "counts.json")])
    assert result.exit_code != 0 and message in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["data", "characters", str(tmp_path)])
    assert result.exit_code != 0 and "it has no index.parquet" in " ".join(result.output.split())


def test_counting():
    assert count_characters(["上海 Shanghai", "海，海"]) == {"海": 3, "上": 1}
