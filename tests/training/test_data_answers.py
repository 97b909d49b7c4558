"""Answers of an endpoint that are used and rejected, and recipes that are checked."""

import json

import pytest

from qwen_image_fast.chat import EndpointError
from qwen_image_fast.training.data import annotate as module
from qwen_image_fast.training.data.annotation import InvalidAnnotation, read_annotation
from qwen_image_fast.training.data.recipe import AnnotateRecipe, read_annotate_recipe
from qwen_image_fast.training.recipe.fields import RecipeError

GOOD = {
    "caption": 'A cup beside a sign that says "你好".', "image_type": "photograph", "image_style": "realistic",
    "watermarks": [], "abnormal_element": False, "texts": ["你好"],
}  # fmt: skip
WHOLE = json.dumps(GOOD, ensure_ascii=False)


@pytest.mark.parametrize(
    "answer, changes, repair",
    [
        (WHOLE, {}, None),
        (f"Here it is:\n```json\n{WHOLE}\n```\nAnything else?", {}, "a fence"),
        (f"<think>{{hm}}</think>{WHOLE}", {}, "a fence"),
        (WHOLE[:-1].rstrip("]}") + ',"half a wo', {}, "cut off"),
        (json.dumps(GOOD | {"abnormal_element": "Yes"}), {"abnormal_element": True}, "was 'Yes'"),
        (json.dumps(GOOD | {"watermarks": "Getty", "texts": None}), {"watermarks": ["Getty"], "texts": []}, "one text"),
        (json.dumps(GOOD | {"texts": [{"text": "A", "language": "en"}]}), {"texts": ["A"]}, "held objects"),
        (WHOLE.replace('"image_type"', '"Image Type"').replace('"watermarks"', '"Watermark List"'), {}, "is 'image"),
        (WHOLE.replace('"你好"]', '"你好",]'), {}, "commas"),
        (json.dumps(GOOD | {"caption": "a\x07b"}), {"caption": "ab"}, "control characters"),
        (WHOLE.replace("A cup", "A {cup,\\n\\\"x\\\"]"), {"caption": GOOD["caption"].replace("A cup", 'A {cup,\n"x"]')},
         None),
    ],
)  # fmt: skip
def test_answers_that_can_be_used(answer, changes, repair):
    found, repairs = read_annotation(answer)
    assert vars(found) == GOOD | changes
    assert (repair is None and not repairs) or repair in "; ".join(repairs)


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("", "has no JSON object"), ("I'm sorry.", "has no JSON object: \"I'm sorry.\""),
        (WHOLE[:20], "breaks off before"), (WHOLE[:80], "lacks image_style, .*: it was cut off"),
        ("{caption: yes}", "cannot be read"), ("{" * 5000, "breaks off"), ("{}", "lacks caption"),
        (json.dumps(GOOD | {"caption": " "}), "the caption is empty"), (json.dumps(GOOD | {"caption": 3}), "be a text"),
        (json.dumps(GOOD | {"caption": "x" * 100_000}), "100000 characters, more than 20000"),
        (json.dumps(GOOD | {"texts": 3}), "texts must be a list"),
        (json.dumps(GOOD | {"abnormal_element": "perhaps"}), "must be true or false, got 'perhaps'"),
    ],
)  # fmt: skip
def test_answers_that_are_rejected(answer, sentence):
    with pytest.raises(InvalidAnnotation, match=sentence):
        read_annotation(answer)


def test_recipes_are_checked(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("sources: [{path: photos}]\nmodel: m\nendpoint: http://localhost:1/v1\n")
    assert read_annotate_recipe(file, ["parallel=9"]).parallel == 9
    for change, sentence in [("model=''", "model must be a name"), ("parallel=0", "parallel must be at least 1"),
                             ("timeout=0", "above 0"),
                             ("language=''", "language must be"), ("sources=[]", "at least one path")]:  # fmt: skip
        with pytest.raises(RecipeError, match=sentence):
            read_annotate_recipe(file, [change])
    with pytest.raises(FileNotFoundError, match="api_key_file must be a file"):
        module.captioner(read_annotate_recipe(file, [f"api_key_file={tmp_path / 'none'}"]))
    with pytest.raises(FileNotFoundError, match=r"there is no Qwen2.5-VL in \./nowhere"):
        module.captioner(AnnotateRecipe(model="./nowhere"))
    with pytest.raises(EndpointError, match="could not answer"):
        module.captioner(read_annotate_recipe(file, ["timeout=1"]))("", "", [])
