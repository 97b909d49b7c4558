"""Parameters inside PNG files, and the names that pictures get."""

import json

import pytest
from PIL import Image, PngImagePlugin

from qwen_image_fast.output_files import OutputFiles
from qwen_image_fast.png_metadata import read_parameters, read_request, write_png

PARAMETERS = {
    "model": "Qwen/Qwen-Image",
    "prompt": "一只猫坐在“咖啡馆”里 🐈\nÜbermut, naïve",
    "negative_prompt": " ",
    "width": 32,
    "height": 16,
    "steps": 4,
    "cfg": 4.0,
    "seed": 2**40,
    "max_sequence_length": 512,
    "dtype": "float32",
    "lightning": None,
}
IMAGE = Image.new("RGB", (32, 16), (10, 200, 30))


def png_with(path, keyword, text, itxt=False):
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if itxt else info.add_text)(keyword, text)
    IMAGE.save(path, pnginfo=info)


def test_round_trip(tmp_path):
    write_png(tmp_path / "x.png", IMAGE, PARAMETERS)
    assert read_parameters(tmp_path / "x.png") == {"software": "qwen-image-fast", **PARAMETERS}
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (32, 16) and image.getpixel((3, 3)) == (10, 200, 30)


def test_the_text_is_utf8_in_the_file(tmp_path):
    """Not escaped, so that any viewer of PNG text shows the prompt."""
    write_png(tmp_path / "x.png", IMAGE, PARAMETERS)
    assert "一只猫坐在".encode() in (tmp_path / "x.png").read_bytes()


@pytest.mark.parametrize(
    ("keyword", "text", "message"),
    [
        ("Comment", "made elsewhere", "holds no parameters"),
        ("parameters", "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7", "holds the parameters of other software"),
        ("parameters", '{"prompt": "a cat"}', "holds the parameters of other software"),
        ("parameters", "[1]", "holds the parameters of other software"),
    ],
)
def test_pictures_of_other_software(tmp_path, keyword, text, message):
    png_with(tmp_path / "x.png", keyword, text)
    with pytest.raises(ValueError, match=message):
        read_parameters(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "seven"), ("width", 1.5), ("prompt", None), ("prompt", 3), ("steps", True)]
)
def test_parameters_of_the_wrong_type(tmp_path, name, value):
    text = json.dumps({"software": "qwen-image-fast", **PARAMETERS, name: value})
    png_with(tmp_path / "x.png", "parameters", text, itxt=True)
    with pytest.raises(ValueError, match=rf"x\.png: {name} must "):
        read_request(tmp_path / "x.png")


OLD = {**PARAMETERS, "version": "0.1.0", "device": "cpu", "lora": None, "seed": 7, "cfg": 4.0}
OLDER = [
    ({**OLD, "command": "generate"}, "text", {"width": 32, "height": 16, "seed": 7, "negative_prompt": " "}),
    (
        {**OLD, "command": "edit", "image": ["a.png", "b.jpg"], "mask": None, "strength": 1.0, "size": None,
         "megapixel": False, "lora": ["a=b/x.safetensors=0.5"], "lightning": 4},
        "edit",
        {"width": None, "strength": 1.0, "lightning": 4},
    ),
    (
        {**OLD, "command": "edit", "image": ["a.png"], "mask": "m.png", "strength": 0.5, "size": "50x21"},
        "edit",
        {"width": 50, "height": 21, "strength": 0.5},
    ),
    (
        {**OLD, "command": "layers", "image": "a.png", "count": 2, "resolution": 1024, "exact": True, "layer": 2},
        "layers",
        {"count": 2, "resolution": 1024, "exact": True},
    ),
    (
        {**OLD, "command": "controlnet", "control": ["a.png"], "net": "owner/net", "scale": 0.5, "mask": None},
        "controlnet",
        {"net": "owner/net", "scale": 0.5, "width": None},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "kind", "expected"), OLDER)
def test_files_of_before_kinds(tmp_path, parameters, kind, expected):
    """As 067c868 wrote them: `command`, relative paths, the result's sides in any case, LoRAs as text."""
    write_png(tmp_path / "x.png", IMAGE, parameters)
    request, _, unknown = read_request(tmp_path / "x.png")
    assert request.kind == kind and unknown == []
    assert {name: getattr(request, name) for name in expected} == expected
    if kind == "edit" and parameters.get("lora"):
        assert [one.path for one in request.image] == ["a.png", "b.jpg"]
        assert [(lora.name, lora.scale) for lora in request.lora] == [("a=b/x.safetensors", 0.5)]


def test_files_of_later_versions(tmp_path):
    write_png(tmp_path / "x.png", IMAGE, {**PARAMETERS, "kind": "text", "sharpness": 3})
    assert read_request(tmp_path / "x.png")[2] == ["sharpness"]
    write_png(tmp_path / "y.png", IMAGE, {**PARAMETERS, "kind": "hologram"})
    with pytest.raises(ValueError, match="made by a later version: it is of the kind hologram"):
        read_request(tmp_path / "y.png")


def test_files_that_are_no_png(tmp_path):
    IMAGE.save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg is not a PNG picture"):
        read_parameters(tmp_path / "x.jpg")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="is not a PNG picture"):
        read_parameters(tmp_path / "empty.png")
    with pytest.raises(FileNotFoundError):
        read_parameters(tmp_path / "none.png")


def test_a_damaged_png(tmp_path):
    write_png(tmp_path / "x.png", IMAGE, PARAMETERS)
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:60])
    with pytest.raises(ValueError, match="is damaged"):
        read_parameters(tmp_path / "x.png")


def names(files, count):
    return [files.write(IMAGE, PARAMETERS).name for _ in range(count)]


def test_pictures_in_a_folder_are_numbered_and_never_replaced(tmp_path):
    (tmp_path / "image-0002.png").write_text("mine")
    assert names(OutputFiles(tmp_path, False, 2), 2) == ["image-0001.png", "image-0003.png"]
    assert (tmp_path / "image-0002.png").read_text() == "mine"


def test_a_file_keeps_its_name_where_that_is_free(tmp_path):
    assert names(OutputFiles(tmp_path / "x.png", False, 1), 1) == ["x.png"]
    assert names(OutputFiles(tmp_path / "x.png", False, 1), 1) == ["x-0001.png"]
    assert names(OutputFiles(tmp_path / "x.PNG", False, 2), 2) == ["x-0002.png", "x-0003.png"]


def test_overwrite(tmp_path):
    for name in ("x.png", "image-0001.png"):
        (tmp_path / name).write_text("old")
    assert names(OutputFiles(tmp_path / "x.png", True, 1), 1) == ["x.png"]
    assert names(OutputFiles(tmp_path, True, 2), 2) == ["image-0001.png", "image-0002.png"]
    assert read_parameters(tmp_path / "x.png")["seed"] == 2**40


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pictures", r"there is no folder .*pictures; did you mean .*/picture\?$"),
        ("none", r"there is no folder .*none; .*/none/ would be made$"),
        ("none/x.png", "there is no folder .*none$"),
        ("x.jpg", "x.jpg must be a .png file or a folder"),
    ],
)
def test_output_that_cannot_be(tmp_path, name, message):
    (tmp_path / "picture").mkdir()
    with pytest.raises(ValueError, match=message):
        OutputFiles(tmp_path / name, False, 1)


def test_space(tmp_path):
    files = OutputFiles(tmp_path, False, 1)
    files.check_space(1000)
    with pytest.raises(OSError, match="no disk space for the output in .* MB free, up to .* MB needed"):
        files.check_space(10**18)
