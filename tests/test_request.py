"""The description of a picture: what it takes, refuses and passes on, and that nothing else lists its fields."""

import inspect
import json
from pathlib import Path
from typing import Annotated

import pytest
from PIL import Image
from pydantic import Field, TypeAdapter

import qwen_image_fast
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.model_defaults import RELEASED, Generation, generation_of, model_class
from qwen_image_fast.request import KINDS, AnyRequest, RequestError, make
from qwen_image_fast.request_fields import RATIOS, argument_of, limits, parse_size, rule, unit_of

INPUTS = {
    "text": {},
    "image_to_image": {"image": "a.png"},
    "inpaint": {"image": "a.png", "mask": "m.png"},
    "edit": {"image": ["a.png"]},
    "controlnet": {"control": ["a.png"]},
    "layers": {"image": "a.png"},
}
PICTURE = Image.new("RGB", (61, 37))


def opened(request):
    """A picture for every file of a request."""
    given = {name: getattr(request, name) for name in ("image", "mask", "control") if getattr(request, name, None)}
    return {name: [PICTURE] * len(value) if isinstance(value, list) else PICTURE for name, value in given.items()}


def signature(name):
    return inspect.signature(getattr(qwen_image_fast, name).__call__).parameters


# ---- defaults ---------------------------------------------------------------------------------------------------


def test_the_tiny_model_knows_its_own():
    name = model_class(SHIPPED, "tiny")
    generation = generation_of(SHIPPED, name)
    request = make("text", {"prompt": "x"}, generation=generation)
    assert (request.width, request.height, request.steps, request.cfg) == (128, 128, 20, 1.0)
    edit = make("edit", {"prompt": "x", "image": "a.png"}, generation=generation)
    assert (edit.steps, edit.cfg, edit.width) == (20, 1.0, None), "an edit keeps its picture's size"


def test_diffusers_says_nothing_about_them(caplog, recwarn):
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.enable_propagation()
    try:
        diffusers.QwenImagePipeline.from_pretrained(SHIPPED)
    finally:
        diffusers.utils.logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn]
    assert not [text for text in said if "generation" in text or "width" in text]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("QwenImagePipeline", (1328, 1328, 50, 4.0)),
        ("QwenImageEditPipeline", (1024, 1024, 50, 4.0)),
        ("QwenImageEditPlusPipeline", (1024, 1024, 40, 4.0)),
    ],
)
def test_released_models(tmp_path, name, expected):
    request = make("text", {"prompt": "x"}, generation=generation_of(tmp_path, name))
    assert (request.width, request.height, request.steps, request.cfg) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stepz": 3}', "there is no stepz for a model; did you mean steps?"),
        ('{"steps": 0}', "steps must be an integer, 1 to 1000, got 0"),
        ('{"width": 100}', "width must be an integer, 16 to 8192, a multiple of 16, got 100"),
        ("[]", "must hold a json object, got list"),
        ("{", "is not valid json"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, message):
    (tmp_path / "generation.json").write_text(content)
    with pytest.raises(ValueError, match="generation.json") as error:
        generation_of(tmp_path, "QwenImagePipeline")
    assert message in str(error.value)


def test_a_saved_pipeline_keeps_its_defaults(tmp_path):
    from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline

    QwenImageEditPlusPipeline.from_pretrained(SHIPPED).save_pretrained(tmp_path / "copy")
    assert generation_of(tmp_path / "copy", "x") == generation_of(SHIPPED, "x") != Generation()


def test_what_wins():
    """Defaults < the model's < stored < Lightning's < given."""
    generation = Generation(steps=20, cfg=1.0)
    stored = {"steps": 30, "cfg": 3.0, "width": 32, "height": 64, "prompt": "old"}

    def chosen(given, stored=stored):
        request = make("text", given, stored, generation)
        return request.prompt, request.steps, request.cfg, request.width, request.height

    assert chosen({"prompt": "x"}, {}) == ("x", 20, 1.0, 1328, 1328)
    assert chosen({}) == ("old", 30, 3.0, 32, 64)
    assert chosen({"lightning": 4}) == ("old", 4, 1.0, 32, 64)
    assert chosen({"lightning": 4, "num_inference_steps": 9, "size": "48x16"}) == ("old", 9, 1.0, 48, 16)
    assert chosen({"width": 48}) == ("old", 30, 3.0, 48, 1328), "a side given alone does not stand beside a stored one"


# ---- names, sizes, sentences -------------------------------------------------------------------------------------


def test_sizes():
    usual = (1328, 1328)
    assert parse_size("1664x928", usual) == parse_size("1664X928", usual) == parse_size("16:9", usual) == (1664, 928)
    assert all(w % 16 == h % 16 == 0 for w, h in RATIOS.values())
    for name, (w, h) in RATIOS.items():
        a, b = map(int, name.split(":"))
        assert abs(w / h / (a / b) - 1) < 0.01
        w, h = parse_size(name, (128, 128))
        assert w % 16 == h % 16 == 0 and abs(w * h / 128**2 - 1) < 0.2 and (w > h) == (a > b)


ONE = {"prompt": "x"}
BAD = [
    ("text", {}, "prompt must be given for text"),
    ("text", {"prompt": "  "}, "the prompt is empty"),
    ("text", {"prompt": 7}, "prompt must be a text, got 7"),
    ("text", {**ONE, "stepz": 3}, "there is no stepz for text; did you mean steps?"),
    ("text", {**ONE, "strength": 0.5}, "there is no strength for text"),
    ("text", {**ONE, "steps": 0}, "steps must be an integer, 1 to 1000, got 0"),
    ("text", {**ONE, "steps": True}, "steps must not be a truth value, got True"),
    ("text", {**ONE, "steps": 1.5}, "steps must be an integer, 1 to 1000, got 1.5"),
    ("text", {**ONE, "steps": 3, "num_inference_steps": 3}, "steps and num_inference_steps are the same"),
    ("text", {**ONE, "cfg": float("nan")}, "cfg must be a number, 1 to 100, got nan"),
    ("text", {**ONE, "dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
    ("text", {**ONE, "lightning": 6}, "lightning must be 4 or 8, got 6"),
    ("text", {**ONE, "size": "100x64"}, "width must be a multiple of 16 pixels, got 100; try 96"),
    ("text", {**ONE, "size": "99999x99999"}, "width must be an integer, 16 to 8192, got 99999"),
    ("text", {**ONE, "size": "5:4"}, "size must be WIDTHxHEIGHT or one of 1:1, 16:9"),
    ("text", {**ONE, "size": "64x64", "width": 64}, "give either size or width and height, got both"),
    ("text", {**ONE, "cfg": 1, "negative_prompt": "y"}, "negative_prompt has no effect without guidance"),
    ("text", {**ONE, "lightning": 4, "negative_prompt": "y"}, "negative_prompt has no effect without guidance"),
    ("text", {**ONE, "lora": [{"file": "x"}]}, "lora could not be read"),
    ("text", {**ONE, "lora": "x=nan"}, "lora could not be read"),
    ("inpaint", {**ONE, "image": "a.png"}, "mask must be given for inpaint"),
    ("image_to_image", {**ONE, "image": "a.png", "strength": 0}, "strength must be a number, more than 0 and"),
    ("edit", {**ONE, "image": []}, "image must be a picture's file, got []"),
    ("edit", {**ONE, "image": "a.png", "strength": 0.5}, "strength has no effect without a mask"),
    ("edit", {**ONE, "image": ["a", "b"], "mask": "m"}, "image must be given once with a mask, got 2"),
    ("controlnet", {**ONE, "control": ["a", "b"], "mask": "m"}, "control must be given once with a mask, got 2"),
    ("controlnet", {**ONE, "control": "a", "size": "30x32"}, "width must be a multiple of 16 pixels, got 30; try 32"),
    ("layers", {"image": "a", "resolution": 512}, "resolution must be 640 or 1024, got 512"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "message"), BAD)
def test_what_it_refuses(kind, given, message):
    with pytest.raises(RequestError) as error:
        make(kind, given)
    assert str(error.value).startswith(message) or message in str(error.value)


def test_a_sentence_with_the_names_of_options():
    with pytest.raises(RequestError) as error:
        make("edit", {**ONE, "image": "a.png", "strength": 0.5})
    assert error.value.named(lambda name: f"--{name}") == "--strength has no effect without a --mask"


@pytest.mark.parametrize(
    ("kind", "given", "model", "message"),
    [
        ("edit", {"image": "a"}, "QwenImagePipeline", "model must hold a QwenImageEditPlusPipeline or .* to edit, "),
        ("edit", {"image": ["a", "b"]}, "QwenImageEditPipeline", "image must be given once for .*, got 2"),
        ("layers", {"image": "a", "model": "tiny"}, "QwenImageEditPlusPipeline", "one that can is .*-Layered$"),
        ("controlnet", {"control": "a", "model": "tiny"}, "QwenImageEditPlusPipeline", "no ControlNet for tiny: name "),
        ("text", {}, "StableDiffusionPipeline", "holds a StableDiffusionPipeline; one that can is Qwen/Qwen-Image$"),
        ("text", {}, "QwenImageLayeredPipeline", "to draw, Qwen/Qwen-Image holds a QwenImageLayeredPipeline"),
    ],
)
def test_a_model_that_cannot(kind, given, model, message):
    with pytest.raises(RequestError, match=message):
        make(kind, {**ONE, **given}).pipeline(model)


# ---- what follows from it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_takes_the_call(kind):
    """Every argument is one of the call's, and those of its own fields are all there."""
    request = make(kind, {**ONE, **INPUTS[kind], "cfg": 2, "seed": 1})
    name = request.pipeline(type(request).models[0])
    call = request.call(opened(request))
    assert set(call) <= set(signature(name)), name
    wanted = {argument_of(field) for field in type(request).model_fields.values()} - {None}
    absent = {"edit": {"mask_image", "strength"}, "controlnet": {"control_mask"}}.get(kind, set())
    assert wanted - absent <= set(call)
    assert call["negative_prompt"] == " " and "negative_prompt" not in make(
        kind, {**ONE, **INPUTS[kind], "cfg": 1}
    ).call(opened(request))


@pytest.mark.parametrize(
    ("kind", "given", "size"),
    [
        ("text", {"size": "32x16"}, (32, 16)),
        ("image_to_image", {"image": "a"}, (61, 37)),
        ("image_to_image", {"image": "a", "width": 122}, (122, 74)),
        ("edit", {"image": "a", "height": 74}, (122, 74)),
        ("edit", {"image": "a", "size": "9x99"}, (9, 99)),
        ("controlnet", {"control": "a"}, (48, 32)),
        ("controlnet", {"control": "a", "height": 64}, (48, 64)),
        ("layers", {"image": "a", "exact": True}, (61, 37)),
    ],
)
def test_the_size_of_the_result(kind, given, size):
    request = make(kind, {**ONE, **given})
    assert request.size(opened(request)) == size
    call = request.call(opened(request))
    assert (call.get("width"), call.get("height")) == (size if kind != "layers" else (None, None))


def test_edits():
    request = make("edit", {**ONE, "image": ["a", "b"]})
    assert request.call(opened(request))["image"] == [PICTURE, PICTURE]
    request = make("edit", {**ONE, "image": "a", "mask": "m", "strength": 0.5, "megapixel": True})
    call = request.call(opened(request))
    assert call["image"] is call["mask_image"] is PICTURE and call["strength"] == 0.5 and "width" not in call
    assert call["preserve_size"] is False
    for plus in ("", "Plus"):  # each model's own template, with a mask as without
        inpaint = f"QwenImageEdit{plus}InpaintPipeline"
        assert request.pipeline(f"QwenImageEdit{plus}Pipeline") == request.pipeline(inpaint) == inpaint


@pytest.mark.parametrize("kind", KINDS)
def test_json_goes_round(kind):
    """As a server will read and write it: told apart by their kind, numbers as text too."""
    adapter = TypeAdapter(Annotated[AnyRequest, Field(discriminator="kind")])
    request = make(kind, {**ONE, **INPUTS[kind], "steps": "7", "lora": "style.safetensors=0.5"})
    assert adapter.validate_json(adapter.dump_json(request)) == request
    schema = adapter.json_schema()["$defs"][type(request).__name__]["properties"]
    assert schema["steps"]["minimum"] == 1 and all(schema[name].get("description") for name in schema if name != "kind")


def test_lora_texts():
    def lora(text):
        (one,) = make("text", {**ONE, "lora": text}).lora
        return one.name, one.scale

    assert lora("a=b/x.safetensors=0.5") == ("a=b/x.safetensors", 0.5)
    assert lora("a=b/x.safetensors") == ("a=b/x.safetensors", 1.0) and lora("x") == ("x", 1.0)


# ---- the documentation -------------------------------------------------------------------------------------------


def fields_table():
    """The table of docs/request.md."""
    rows = ["| field | of | what | values | default |", "|---|---|---|---|---|"]
    described: dict[tuple[str, ...], list[str]] = {}
    for kind, cls in KINDS.items():
        for name, field in cls.model_fields.items():
            if name != "kind":
                default = "" if field.is_required() else json.dumps(field.default)
                values = " ".join(filter(None, [rule(field), unit_of(field)]))
                described.setdefault((name, str(field.description), values, default), []).append(kind)
    for (name, text, values, default), kinds in described.items():
        of = "all" if set(kinds) == set(KINDS) else ", ".join(kinds)
        shown = "" if default in ("null", "[]") else "required" if not default else f"`{default}`"
        also = next(argument_of(KINDS[kind].model_fields[name]) for kind in kinds)
        named = f"`{name}`" + (f" (`{also}`)" if also not in (None, name) else "")
        rows.append(f"| {named} | {of} | {text} | {values} | {shown} |")
    return "\n".join(rows)


def test_the_documentation_lists_every_field():
    page = (Path(__file__).parents[1] / "docs" / "request.md").read_text(encoding="utf-8")
    assert fields_table() in page, f"docs/request.md must hold this table:\n{fields_table()}"


def test_limits_are_read_from_pydantic():
    fields = KINDS["image_to_image"].model_fields
    assert limits(fields["strength"]) == ("more than 0 and at most 1", 0, 1) and limits(fields["seed"])[1] == 0
    assert set(RELEASED) <= set(KINDS["text"].models)
