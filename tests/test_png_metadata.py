"""Parameters inside PNG files, and the names that pictures get."""

import json

import pytest
from PIL import Image, PngImagePlugin

from qwen_image_fast.output_files import OutputFiles
from qwen_image_fast.png_metadata import read_parameters, write_png

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


@pytest.mark.parametrize(("name", "value"), [("seed", "7"), ("width", 1.5), ("prompt", None), ("steps", True)])
def test_parameters_of_the_wrong_type(tmp_path, name, value):
    text = json.dumps({"software": "qwen-image-fast", **PARAMETERS, name: value})
    png_with(tmp_path / "x.png", "parameters", text, itxt=True)
    with pytest.raises(ValueError, match=f"the parameter {name} must be "):
        read_parameters(tmp_path / "x.png")


def test_a_missing_parameter(tmp_path):
    write_png(tmp_path / "x.png", IMAGE, {k: v for k, v in PARAMETERS.items() if k != "cfg"})
    with pytest.raises(ValueError, match="the parameter cfg must be int or float, got None"):
        read_parameters(tmp_path / "x.png")


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


@pytest.mark.parametrize("name", ["none", "none/x.png", "x.jpg"])
def test_output_that_cannot_be(tmp_path, name):
    with pytest.raises(ValueError, match="must be a .png file in an existing folder, or an existing folder"):
        OutputFiles(tmp_path / name, False, 1)


def test_space(tmp_path):
    files = OutputFiles(tmp_path, False, 1)
    files.check_space(1000)
    with pytest.raises(OSError, match="no disk space for the output in .* MB free, up to .* MB needed"):
        files.check_space(10**18)
