"""The commands that take pictures: what they write, and what they refuse."""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast.cli import app
from qwen_image_fast.cli.compare import side_by_side
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
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (61, 37)), ("b.jpg", (48, 64))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(name)
    mask = Image.new("L", (61, 37))
    mask.paste(255, (10, 5, 40, 30))
    mask.save("mask.png")


def run(command, *args, model=None):
    where = () if model is None else ("--model", model)
    return CliRunner().invoke(app, [command, *map(str, (*args, *where, "--steps", 2))])


def sha256(name):
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def said(result):
    """Standard error without the lines of progress."""
    lines = result.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r", \d+:\d\d(, about \S+ left)?\n$", line))


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
    expected = {"kind": "edit", "prompt": "make it red", "model": str(models / "edit")}
    assert expected.items() <= found.items() and not {"mask", "width", "strength"} & found.keys()
    assert found["image"] == [{"path": os.path.abspath("a.png"), "sha256": sha256("a.png")}]
    pipe = qwen_image_fast.QwenImageEditPlusPipeline.from_pretrained(models / "edit", torch_dtype=torch.float32)
    call = {"true_cfg_scale": 1.0, "num_inference_steps": 2, "seed": 3, "progress": False}
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
    moved = f"no picture {os.path.abspath('mask.png')}; if hole.png was made from a file that has moved, give --mask"
    assert moved in result.stderr
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


def test_inputs_are_found_again(models):
    """From another folder, beside the picture when both have moved, and with a word where one has changed."""
    assert (
        run("edit", "x", "--image", "a.png", "--seed", 1, "--output", "out.png", model=models / "edit").exit_code == 0
    )
    before = Path("out.png").read_bytes()
    for name in ("away", "moved"):
        Path(name).mkdir()
    os.chdir("away")
    assert repeated("edit", "../out.png") == before
    os.chdir("..")
    shutil.move("out.png", "moved/out.png")
    shutil.move("a.png", "moved/a.png")
    again = Image.open(io.BytesIO(repeated("edit", "moved/out.png")))
    assert again.tobytes() == Image.open("moved/out.png").tobytes()
    shutil.copy("b.jpg", "moved/a.png")
    result = CliRunner().invoke(app, ["edit", "--from-image", "moved/out.png", "--quiet", "--output", "changed.png"])
    assert result.exit_code == 0, result.output
    assert (
        result.stderr == "note: moved/a.png has changed since moved/out.png was made from it: the result will differ\n"
    )
    assert size("changed.png") == (48, 64)


@pytest.mark.parametrize("command", ["edit", "layers", "controlnet"])
def test_inspect_prints_the_command_of_a_picture(models, command):
    args = {
        "edit": ("a hole", "--image", "a.png", "--mask", "mask.png", "--strength", 0.5),
        "layers": ("a.png", "--prompt", "a cat", "--count", 1, "--exact-size"),
        "controlnet": ("a cat", "--control", "a.png", "--net", models / "union", "--scale", 0.5),
    }[command]
    model = models / ("layered" if command == "layers" else "edit")
    assert run(command, *args, "--seed", 2, "--output", "x.png", model=model).exit_code == 0
    shown = CliRunner().invoke(app, ["inspect", "x.png", "--json"])
    program, *words = shlex.split(json.loads(shown.stdout)["command_line"])
    result = CliRunner().invoke(app, [*words, "--output", "y.png"])
    assert (program, result.exit_code) == ("qwen-image-fast", 0), result.output
    assert Path("y.png").read_bytes() == Path("x.png").read_bytes()


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
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("qwen-image-fast") and "--model tiny" in line]
    lines = [line for line in lines if "hello.png" in line]
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


def test_what_a_newcomer_copies_first_from_the_readme_runs_offline(in_tmp, monkeypatch):
    """The first block of Python, and of each command the first line."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    exec(readme.split("```python\n")[1].split("```")[0], {})
    assert size("hello.png") == (128, 128)
    lines = [line for line in readme.splitlines() if line.startswith("qwen-image-fast ")]
    firsts = {line.split()[1]: line for line in reversed(lines)}
    for name in ("generate", "edit", "inspect", "doctor"):
        assert "tiny" in firsts[name] or "hello.png" in firsts[name] or name == "doctor"


def test_a_mask(models):
    args = ("--image", "a.png", "--mask", "mask.png", "--output", "out.png")
    result = run("edit", "a hole", *args, "--strength", 0.5, model=models / "edit")
    assert result.exit_code == 0, result.output
    assert size("out.png") == (61, 37) and read_parameters("out.png")["mask"]["path"] == os.path.abspath("mask.png")


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
    "--size must be WIDTHxHEIGHT or one of 1:1, 16:9, ": ("edit", "x", "--image", "a.png", "--size", "3"),
    "--image must be given once with a --mask, got 2": (
        "edit", "x", "--image", "a.png", "--image", "b.jpg", "--mask", "mask.png",
    ),
    "--control must be given once with a --mask, got 2": (
        "controlnet", "x", "--control", "a.png", "--control", "b.jpg", "--mask", "mask.png",
    ),
    "nothing to work on: give --image or --from-image": ("edit", "x"),
    "nothing to work on: give --control or --from-image": ("controlnet", "x"),
    "nothing to make: give a prompt, --prompts-file or --from-image": ("edit", "--image", "a.png"),
    "the prompt is empty": ("edit", " ", "--image", "a.png"),
    "folder could not be read as a picture": ("edit", "x", "--image", "folder"),
    "short.jpg could not be read as a picture": ("layers", "short.jpg"),
    "huge.png could not be read as a picture: Image size (400000000 pixels) exceeds limit": ("layers", "huge.png"),
    "--mask must have the size of its image, 61x37, or its aspect ratio, got 48x64": (
        "edit", "x", "--image", "a.png", "--mask", "b.jpg",
    ),
    "--strength must be a number, more than 0 and at most 1, got 0": (
        "edit", "x", "--image", "a.png", "--mask", "mask.png", "--strength", 0,
    ),
    "--resolution must be 640 or 1024, got 512": ("layers", "a.png", "--resolution", 512),
    "--model must hold a QwenImageLayeredPipeline to take pictures apart, ": ("layers", "a.png"),
    "must be a multiple of 16 pixels, got 30; try 32": ("controlnet", "x", "--control", "a.png", "--size", "30x32"),
    "a.png holds no parameters": ("edit", "--from-image", "a.png"),
    "there is no folder no/such/folder": ("controlnet", "x", "--control", "a.png", "--net", "no/such/folder"),
    "output missing/x.png: there is no folder missing": ("edit", "x", "--image", "a.png", "--output", "missing/x.png"),
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
    assert said(result).startswith("error: ") and said(result).count("\n") == 1 and text in result.stderr
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("args", "kind", "text"),
    [
        (("edit", "x", "--image", "a.png"), "text_to_image", "--model must hold a QwenImageEditPlusPipeline or "),
        (("edit", "x", "--image", "a.png"), "layered", "one that can is Qwen/Qwen-Image-Edit-2511"),
        (("generate", "x"), "layered", "--model must hold a QwenImagePipeline or "),
        (("layers", "a.png"), None, "tiny holds a QwenImageEditPlusPipeline; one that can is Qwen/Qwen-Image-Layered"),
        (
            ("controlnet", "x", "--control", "a.png"),
            None,
            "no ControlNet for tiny: name a --model such as Qwen/Qwen-Image",
        ),
    ],
)
def test_a_model_that_cannot(models, args, kind, text):
    """Nor do the commands that have no tiny model offer it."""
    result = run(*args, model=models / kind if kind else "tiny")
    assert result.exit_code == 2 and text in said(result) and said(result).count("\n") == 1, result.output
    offers = "tiny: the model that comes with the package" in " ".join(
        CliRunner().invoke(app, [args[0], "--help"], env={"COLUMNS": "300"}).stdout.split()
    )
    assert offers == (args[0] in ("edit", "generate"))


def test_side_by_side_shows_transparency():
    row = side_by_side([Image.new("RGB", (10, 20), "red"), Image.new("RGBA", (32, 40), (0, 0, 0, 0))])
    assert row.size == (20 + 8 + 32, 40) and row.getpixel((5, 5)) == (255, 0, 0)
    assert {row.getpixel((30 + 8 * k, 4)) for k in range(2)} == {(255, 255, 255), (208, 208, 208)}
