"""Captions as the recipe wants them: trigger, weights, lines, shuffling and dropout, repeats; functions of the seed."""

import collections
import json

import pytest
from source_helpers import files

from qwen_image_fast.training.recipe.captions import CaptionsRecipe
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.make import make_source


def captions_of(root, count, seed=0, **fields):
    captions = CaptionsRecipe(**fields.pop("captions", {}))
    source = make_source(DataRecipe(source=str(root), captions=captions, **fields))
    made = [source.sample(seed, i).caption for i in range(count)]
    assert made == [source.sample(seed, i).caption for i in reversed(range(count))][::-1]
    return collections.Counter(made)


def one(folder, text):
    """A folder of one picture."""
    return files(folder, {"a.png": 0} if text is None else {"a.png": 0, "a.txt": text})


@pytest.mark.parametrize(
    "text, captions, expected",
    [
        ("a cat", {"trigger": "sks"}, "sks, a cat"),
        ("a photo of [trigger] asleep", {"trigger": "sks"}, "a photo of sks asleep"),
        (None, {"trigger": "sks"}, "sks"),
        (None, {"default": "a cat"}, "a cat"),
        ("", {"default": "a [trigger] cat", "trigger": "sks"}, "a sks cat"),
        ("a dog", {"default": "a cat"}, "a dog"),
    ],
)
def test_trigger_and_default(tmp_path, text, captions, expected):
    assert captions_of(one(tmp_path, text), 3, captions=captions) == {expected: 3}


@pytest.mark.parametrize(
    "text, fields, lines",
    [
        (None, {"captions": [{"text": "a", "weight": 3}, {"text": "b", "weight": 1}]}, False),
        (None, {"captions": {"a": "a", "b": "b"}}, False),
        ("a\n\na\na\nb\n", None, True),
        (None, {"caption": ["a", "a", "a", "b"]}, False),
        (None, {"caption": "a\na\na\nb"}, True),
    ],
)
def test_several_captions_of_a_picture_by_their_weights(tmp_path, text, fields, lines):
    root = one(tmp_path, text)
    if fields:
        (root / "a.json").write_text(json.dumps(fields))
    weights = {"a": 3.0, "b": 1.0} if fields and isinstance(fields.get("captions"), dict) else {}
    found = captions_of(root, 400, captions={"lines": lines, "weights": weights})
    assert found.keys() == {"a", "b"} and 260 < found["a"] < 340


def test_captions_of_a_kind_that_a_picture_lacks_are_its_best(tmp_path):
    assert captions_of(one(tmp_path, "a"), 3, captions={"weights": {"fused": 1.0}}) == {"a": 3}


def test_options_without_effect_are_said(tmp_path):
    captions = CaptionsRecipe(weights={"raw": 1.0, "fused": 1.0})
    said = make_source(DataRecipe(source=str(one(tmp_path, "a")), captions=captions)).said()
    assert [line.partition(": ")[2] for line in said if "no effect" in line] == [
        "data.captions.weights has no effect for 'fused', a kind of caption that no picture has"
    ]


def test_parts_are_shuffled_and_left_out_behind_those_that_stay(tmp_path):
    root = one(tmp_path, "first, b, c, d")
    shuffled = captions_of(root, 300, captions={"shuffle": True, "keep": 1})
    assert len(shuffled) == 6 and all(text.startswith("first, ") for text in shuffled)
    thinned = captions_of(root, 300, captions={"drop": 0.5, "keep": 1, "trigger": "sks"})
    assert len(thinned) == 8 and all(text.startswith("sks, first") for text in thinned)
    everything = captions_of(root, 300, captions={"drop": 0.9})
    assert "" not in everything and "first" in everything
    other = captions_of(one(tmp_path / "other", "a; b"), 50, captions={"separator": ";", "shuffle": True})
    assert other.keys() == {"a; b", "b; a"}
    assert captions_of(root, 50, seed=1, captions={"shuffle": True}) != captions_of(
        root, 50, captions={"shuffle": True}
    )


def test_repeats_of_folders(tmp_path):
    root = files(tmp_path, {"faces/deep/a.png": 0, "faces/deep/a.txt": "a", "b.png": 1, "b.txt": "b"})
    assert captions_of(root, 8, repeats={"faces": 3}) == {"a": 6, "b": 2}
    assert captions_of(root, 8, repeats={"f*": 3}) == {"a": 6, "b": 2}
    with pytest.raises(RecipeError, match=r"data.repeats must name folders of .* \(., faces/deep\), got 'hands'"):
        captions_of(root, 1, repeats={"hands": 2})


@pytest.mark.parametrize(
    "captions, message",
    [
        ({"drop": 1.0}, r"data.captions.drop must be in \[0, 1\)"),
        ({"keep": 2}, "data.captions.keep must be 0 without shuffle and drop"),
        ({"separator": " "}, "data.captions.separator must hold more than white space"),
        ({"weights": {"raw": 0.0}}, "data.captions.weights must be at least 0, one above 0"),
    ],
)
def test_what_cannot_be(captions, message):
    with pytest.raises(RecipeError, match=message):
        DataRecipe(captions=CaptionsRecipe(**captions)).check()


@pytest.mark.parametrize("texts, effect", [(["a", "b"], False), (["a", " "], True), (["a", None], True)])
def test_a_default_that_no_picture_needs_is_said(tmp_path, texts, effect):
    root = files(tmp_path / "f", {f"{i}.png": i for i in range(2)} | {
        f"{i}.txt": text for i, text in enumerate(texts) if text is not None
    })  # fmt: skip
    said = make_source(DataRecipe(source=str(root), captions=CaptionsRecipe(default="x"))).said()
    expected = "data.captions.default has no effect: every picture has a caption of its own"
    assert any(expected in line for line in said) != effect


@pytest.mark.parametrize(
    "options, tasks, strategy",
    [
        ({"arranged": 0.5}, {}, "shapes"),
        ({"arranged": 0.5, "shapes": 1.0}, {}, None),
        ({"kinds": ["circle", "square", "triangle", "star", "star"]}, {}, "shapes"),
        ({"kinds": ["circle", "square", "triangle", "star", "star"]}, {"ti2i": 1.0}, None),
        ({"photos": "mine"}, {}, "compositional"),
        ({"preset": "tiny", "vision": ["edges"]}, {"ti2i": 1.0}, "scenes"),
    ],
)
def test_options_of_what_is_not_drawn_are_refused(options, tasks, strategy):
    data = DataRecipe(source="synthesis", options=options, tasks=tasks or {"t2i": 1.0})
    if strategy is None:
        make_source(data)
        return
    [name] = options.keys() - {"preset"}
    with pytest.raises(RecipeError, match=f"data.options.{name} has no effect where data.options.{strategy} is 0"):
        make_source(data)


def test_drawn_pictures_have_their_own_captions():
    with pytest.raises(RecipeError, match="data.captions must be empty for squares"):
        make_source(DataRecipe(source="squares", captions=CaptionsRecipe(trigger="sks")))
