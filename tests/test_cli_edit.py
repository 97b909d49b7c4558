"""The commands that take pictures: what they write, and what they refuse."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast.cli import app
from qwen_image_fast.cli.edit import side_by_side
from qwen_image_fast.png_metadata import read_parameters
from qwen_image_fast.tiny import tiny_configs, write_untrained


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An editing model, the Layered model and a ControlNet, all tiny and untrained."""
    root = tmp_path_factory.mktemp("models")
    write_untrained(root / "edit", edit=True)
    write_untrained(root / "layered", edit=True)
    write_untrained(root / "text_to_image")
    flags = {"use_additional_t_cond": True, "use_layer3d_rope": True, "num_layers": 2}
    torch.manual_seed(0)
    config = tiny_configs()
    small = {**config["transformer"], "num_layers": 2}
    qwen_image_fast.QwenImageTransformer2DModel(**{**small, **flags}).save_pretrained(root / "layered" / "transformer")
    index = root / "layered" / "model_index.json"
    index.write_text(index.read_text().replace("EditPlus", "Layered"))
    vae = qwen_image_fast.AutoencoderKLQwenImage(**{**config["vae"], "input_channels": 4})
    vae.save_pretrained(root / "layered" / "vae")
    net = {k: v for k, v in small.items() if k != "guidance_embeds"}
    for name, extra in (("union", 0), ("inpaint", 4)):
        model = qwen_image_fast.QwenImageControlNetModel(**net, extra_condition_channels=extra)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (61, 37)), ("b.jpg", (48, 64))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(name)
    mask = Image.new("L", (61, 37))
    mask.paste(255, (10, 5, 40, 30))
    mask.save("mask.png")
    yield
    torch.set_num_threads(before)


def run(command, *args, model=None):
    where = () if model is None else ("--model", model)
    return CliRunner().invoke(app, [command, *map(str, (*args, *where, "--steps", 2))])


def size(name):
    with Image.open(name) as image:
        return image.size


def test_edit_keeps_the_size_and_repeats_itself(models):
    args = ("make it red", "--image", "a.png", "--seed", 3)
    result = run("edit", *args, "--output", "out.png", "--compare", model=models / "edit")
    assert result.exit_code == 0, result.output
    assert "out.png  seed 3" in result.stdout and "vision" in result.stdout
    assert size("out.png") == (61, 37) and size("out-compare.png") == (61 + 8 + 61, 37)
    found = read_parameters("out.png")
    expected = {"command": "edit", "prompt": "make it red", "image": ["a.png"], "mask": None, "width": 61}
    assert expected.items() <= found.items()
    pipe = qwen_image_fast.QwenImageEditPlusPipeline.from_pretrained(models / "edit", torch_dtype=torch.float32)
    call = {"negative_prompt": " ", "num_inference_steps": 2, "seed": 3, "progress": False}
    image = pipe(Image.open("a.png"), "make it red", **call).images[0]
    with Image.open("out.png") as written:
        assert written.tobytes() == image.tobytes()
    again = run("generate", "--from-image", "out.png")
    assert again.exit_code == 2
    assert "out.png was made by `edit`: `qwen-image-fast edit --from-image out.png` repeats it" in again.stderr


def repeated(command, name, *args):
    """The picture that `--from-image` alone makes of another, which it equals to the byte."""
    result = CliRunner().invoke(app, [command, "--from-image", name, "--quiet", "--output", "again.png", *args])
    assert result.exit_code == 0, result.output
    (again,) = [n for n in result.stdout.split() if "compare" not in n]
    return Path(again).read_bytes()


def test_from_image_repeats_an_edit(models):
    """With everything that was not a default; what is given once more wins."""
    args = (
        "--image",
        "a.png",
        "--image",
        "b.jpg",
        "--size",
        "50x21",
        "--cfg",
        2,
        "--negative-prompt",
        "bad",
        "--seed",
        5,
    )
    assert run("edit", "swap them", *args, "--output", "two.png", model=models / "edit").exit_code == 0
    assert repeated("edit", "two.png") == Path("two.png").read_bytes()
    args = ("--image", "a.png", "--mask", "mask.png", "--strength", 0.5, "--output", "hole.png")
    assert run("edit", "a hole", *args, model=models / "edit").exit_code == 0
    assert repeated("edit", "hole.png") == Path("hole.png").read_bytes()
    assert repeated("edit", "hole.png", "--seed", "7") != Path("hole.png").read_bytes()
    Path("mask.png").rename("moved.png")
    result = run("edit", "--from-image", "hole.png")
    assert result.exit_code == 2
    assert "no picture mask.png; if hole.png was made from a file that has moved, give --mask" in result.stderr
    assert repeated("edit", "hole.png", "--mask", "moved.png") != b""


def test_from_image_repeats_layers_with_their_caption(models, monkeypatch):
    """A caption is drawn at random: the picture keeps it."""
    captions = iter(["a red cat", "a blue dog"])
    monkeypatch.setattr(
        qwen_image_fast.QwenImageLayeredPipeline, "get_image_caption", lambda *args, **kwargs: next(captions)
    )
    args = ("--count", 1, "--exact-size", "--output", "layer.png")
    assert run("layers", "a.png", *args, model=models / "layered").exit_code == 0
    assert read_parameters("layer.png")["prompt"] == "a red cat"
    assert repeated("layers", "layer.png") == Path("layer.png").read_bytes()


def test_from_image_repeats_a_control(models):
    args = ("--control", "a.png", "--net", models / "union", "--scale", 0.5, "--output", "out.png")
    assert run("controlnet", "a cat", *args, model=models / "edit").exit_code == 0
    assert repeated("controlnet", "out.png") == Path("out.png").read_bytes()


def test_several_references_size_and_json(models):
    args = ("--image", "a.png", "--image", "b.jpg", "--images", 2, "--json", "--seed", 1)
    result = run("edit", "swap them", *args, model=models / "edit")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["seeds"] == [1, 2] and [size(f) for f in report["files"]] == [(48, 64)] * 2
    result = run("edit", "x", *args[:4], "--size", "50x21", "--quiet", "--output", "s.png", model=models / "edit")
    assert result.stdout == "s.png\n" and size("s.png") == (50, 21)


def test_a_photograph_and_the_model_of_the_package():
    """A JPEG as cameras write it, turned by its EXIF entry: sizes and comparison are those of the upright picture."""
    rng, exif = np.random.default_rng(1), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((90, 50), Image.Resampling.BICUBIC)
    photo.save("photo.jpg", exif=exif)
    result = run("edit", "make it red", "--image", "photo.jpg", "--output", "out.png", "--compare", model="tiny")
    assert result.exit_code == 0, result.output
    assert size("out.png") == (50, 90) and size("out-compare.png") == (50 + 8 + 50, 90)
    with Image.open("out.png") as out, Image.open("out-compare.png") as both, Image.open("photo.jpg") as given:
        assert np.asarray(out).std() > 1
        assert both.crop((0, 0, 50, 90)).tobytes() == ImageOps.exif_transpose(given).tobytes()
    assert read_parameters("out.png")["model"] == "tiny"


def test_the_readmes_commands_for_the_tiny_model():
    """A red word is drawn, then made blue."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("qwen-image-fast") and "--model tiny" in line]
    colours = []
    for line in lines:
        _, *args = shlex.split(line, comments=True)
        result = CliRunner().invoke(app, [*args, "--steps", "10", "--seed", "1", "--json"])
        assert result.exit_code == 0, result.output
        with Image.open(json.loads(result.stdout)["files"][0]) as image:
            pixels = np.asarray(image, dtype=int).reshape(-1, 3)
        ink = pixels[pixels.min(1) < 128].mean(0)
        colours.append("red" if ink[0] > ink[2] + 80 else "blue" if ink[2] > ink[0] + 80 else ink)
    assert colours == ["red", "blue"]


def test_a_mask(models):
    args = ("--image", "a.png", "--mask", "mask.png", "--output", "out.png")
    result = run("edit", "a hole", *args, "--strength", 0.5, model=models / "edit")
    assert result.exit_code == 0, result.output
    assert size("out.png") == (61, 37) and read_parameters("out.png")["mask"] == "mask.png"


def test_layers(models):
    args = ("--prompt", "a cat", "--count", 2, "--exact-size", "--compare", "--quiet", "--seed", 4)
    result = run("layers", "a.png", *args, model=models / "layered")
    assert result.exit_code == 0, result.output
    names = ["image-0001.png", "image-0002.png", "image-0002-compare.png"]
    assert result.stdout.split() == names and [size(n) for n in names[:2]] == [(61, 37)] * 2
    with Image.open(names[0]) as layer:
        assert layer.mode == "RGBA"
    assert read_parameters(names[1])["layer"] == 2


@pytest.mark.parametrize("mask", [False, True])
def test_controlnet(models, mask):
    args = ("--control", "a.png", "--net", models / ("inpaint" if mask else "union"), "--output", "out.png")
    result = run("controlnet", "a cat", *args, *(("--mask", "mask.png") if mask else ()), model=models / "edit")
    assert result.exit_code == 0, result.output
    assert size("out.png") == (48, 32)


def test_lora_and_lightning(models):
    from safetensors.torch import save_file

    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, 192), key.format("B"): torch.ones(192, 2)}, "x.safetensors")
    common = ("--image", "a.png", "--seed", 1, "--model", models / "edit")
    for name, more in (("plain", ()), ("none", ("--lora", "x.safetensors=0")), ("some", ("--lora", "x.safetensors"))):
        result = CliRunner().invoke(
            app, [str(a) for a in ("edit", "x", *common, "--output", f"{name}.png", "--lightning", 4, *more)]
        )
        assert result.exit_code == 0, result.output
    pixels = [np.asarray(Image.open(f"{n}.png")) for n in ("plain", "none", "some")]
    assert np.array_equal(pixels[0], pixels[1]) and not np.array_equal(pixels[0], pixels[2])
    assert read_parameters("some.png")["steps"] == 4 and read_parameters("some.png")["cfg"] == 1.0


FORMATS = {"x.jpg": "CMYK", "x.webp": "RGB", "x.gif": "P", "x.png": "I;16", "y.png": "RGBA", "z.tif": "L"}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(models, name):
    Image.new(FORMATS[name], (20, 9), None).save(name)
    result = run("edit", "x", "--image", name, "--compare", "--output", "out.png", model=models / "edit")
    assert result.exit_code == 0, result.output
    assert size("out.png") == (20, 9) and size("out-compare.png") == (48, 9)


def test_one_pixel(models):
    Image.new("RGB", (1, 1)).save("one.png")
    assert run("edit", "x", "--image", "one.png", "--output", "out.png", model=models / "edit").exit_code == 0
    assert size("out.png") == (1, 1)


def test_no_file_is_replaced_unasked(models):
    Path("out-compare.png").write_text("mine")
    args = ("--image", "a.png", "--output", "out.png", "--compare", "--quiet")
    result = run("edit", "x", *args, model=models / "edit")
    assert (
        result.stdout.split() == ["out.png", "out-compare-0001.png"] and Path("out-compare.png").read_text() == "mine"
    )
    result = run("edit", "x", *args, "--overwrite", model=models / "edit")
    assert result.stdout.split() == ["out.png", "out-compare.png"] and size("out-compare.png") == (61 + 8 + 61, 37)


BAD = {
    "there is no picture none.png": ("edit", "x", "--image", "none.png"),
    "could not be read as a picture": ("edit", "x", "--image", "text.png"),
    "--size must be WIDTHxHEIGHT, got 3": ("edit", "x", "--image", "a.png", "--size", "3"),
    "--image must be given once for this model or with --mask, got 2": (
        "edit", "x", "--image", "a.png", "--image", "b.jpg", "--mask", "mask.png",
    ),
    "--control must be given once with --mask, got 2": (
        "controlnet", "x", "--control", "a.png", "--control", "b.jpg", "--mask", "mask.png",
    ),
    "nothing to work on: give --image or --from-image": ("edit", "x"),
    "nothing to work on: give --control or --from-image": ("controlnet", "x"),
    "nothing to make: give a prompt or --from-image": ("edit", "--image", "a.png"),
    "the prompt is empty": ("edit", " ", "--image", "a.png"),
    "folder could not be read as a picture": ("edit", "x", "--image", "folder"),
    "short.jpg could not be read as a picture": ("layers", "short.jpg"),
    "huge.png could not be read as a picture: Image size (400000000 pixels) exceeds limit": ("layers", "huge.png"),
    "--mask must have the size of its image, 61x37, or its aspect ratio, got 48x64": (
        "edit", "x", "--image", "a.png", "--mask", "b.jpg",
    ),
    "strength must leave at least one of the 2 steps, got 0": (
        "edit", "x", "--image", "a.png", "--mask", "mask.png", "--strength", 0,
    ),
    "--resolution must be 640 or 1024, got 512": ("layers", "a.png", "--resolution", 512),
    "--model must hold a QwenImageLayeredPipeline, ": ("layers", "a.png"),
    "multiples of 16, got 30 in 30x32; try 32x32": ("controlnet", "x", "--control", "a.png", "--size", "30x32"),
    "a.png holds no parameters": ("edit", "--from-image", "a.png"),
    "there is no folder": ("controlnet", "x", "--control", "a.png", "--net", "no/such/folder"),
    "must be a .png file in an existing folder": ("edit", "x", "--image", "a.png", "--output", "missing/x.png"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "args"), BAD.items(), ids=BAD.keys())
def test_bad_input(models, text, args):
    Path("text.png").write_text("not a picture")
    Path("folder").mkdir()
    Path("short.jpg").write_bytes(Path("b.jpg").read_bytes()[:400])
    if "huge" in text:
        Image.new("1", (20000, 20000)).save("huge.png")
    before = sorted(os.listdir())
    result = run(*args, model=models / "edit")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and text in result.stderr
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("kind", ["text_to_image", "layered"])
def test_a_model_that_does_not_edit(models, kind):
    result = run("edit", "x", "--image", "a.png", model=models / kind)
    assert result.exit_code == 2 and "--model must hold a QwenImageEditPlusPipeline or " in result.stderr


def test_side_by_side_shows_transparency():
    row = side_by_side([Image.new("RGB", (10, 20), "red"), Image.new("RGBA", (32, 40), (0, 0, 0, 0))])
    assert row.size == (20 + 8 + 32, 40) and row.getpixel((5, 5)) == (255, 0, 0)
    assert {row.getpixel((30 + 8 * k, 4)) for k in range(2)} == {(255, 255, 255), (208, 208, 208)}
