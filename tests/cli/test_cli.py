"""The command: what it writes and shows."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from cli_harness import pictures, pixels, refused
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast.cli import app
from qwen_image_fast.pipelines import text_to_image as pipelines
from qwen_image_fast.png_metadata import read_parameters

# ---- what it makes ----------------------------------------------------------------------------------------------


def test_a_picture_and_its_repetition(generate, tiny_folder):
    result = generate("一只红色的猫", "--seed", 5, "--cfg", 3, "--output", "cat.png")
    assert result.exit_code == 0, result.output
    assert "cat.png  seed 5" in result.stdout
    for stage in ("load", "text encoder", "denoise", "decode", "write"):
        assert stage in result.stdout
    assert read_parameters("cat.png") == {
        "software": "qwen-image-fast",
        "version": qwen_image_fast.__version__,
        "kind": "text",
        "model": str(tiny_folder),
        "prompt": "一只红色的猫",
        "negative_prompt": " ",
        "width": 64,
        "height": 32,
        "steps": 2,
        "cfg": 3.0,
        "seed": 5,
        "max_sequence_length": 512,
        "dtype": "float32",
        "lora": [],
        "device": "cpu",
    }
    again = generate("--from-image", "cat.png", "--output", "again.png", model=None, size=None, steps=None)
    assert again.exit_code == 0, again.output
    assert Path("again.png").read_bytes() == Path("cat.png").read_bytes()

    changed = ("--seed", 6, "--output", "other.png")
    other = generate("--from-image", "cat.png", *changed, model=None, size="32x32", steps=None)
    assert other.exit_code == 0, other.output
    found = read_parameters("other.png")
    assert (found["seed"], found["cfg"], found["width"], found["prompt"]) == (6, 3.0, 32, "一只红色的猫")


def test_it_is_the_pipelines_picture(generate, tiny_folder):
    """With guidance against a single space."""
    generate("a cat", "--seed", 11, "--cfg", 4, "--output", "x.png")
    pipe = pipelines.QwenImagePipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    image = pipe("a cat", " ", 4.0, height=32, width=64, num_inference_steps=2, seed=11, progress=False).images[0]
    assert pixels("x.png") == image.tobytes()


def test_prompts_file(generate):
    Path("prompts.txt").write_text("\ufeff# animals\na cat\n\n  二只狗  \n#x\nan owl\n", encoding="utf-8")
    result = generate("--prompts-file", "prompts.txt", "--images", 2, "--batch", 2, "--seed", 7, "--quiet")
    assert result.exit_code == 0, result.output
    names = [f"image-000{i}.png" for i in range(1, 7)]
    assert result.stdout.split() == names and result.stderr == ""
    made = [read_parameters(name) for name in names]
    assert [p["prompt"] for p in made] == ["a cat", "a cat", "二只狗", "二只狗", "an owl", "an owl"]
    assert [p["seed"] for p in made] == [7, 8, 9, 10, 11, 12]
    assert len({pixels(name) for name in names}) == 6


def test_json(generate):
    result = generate("a cat", "--images", 2, "--json", "--cfg", 1)
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert report["files"] == ["image-0001.png", "image-0002.png"] == pictures()
    first, second = report["seeds"]
    assert second == first + 1 and read_parameters("image-0002.png")["seed"] == second
    assert set(report["seconds"]) == {"load", "text encoder", "denoise", "decode", "write"}
    assert all(s >= 0 for s in report["seconds"].values()) and report["parameters"]["cfg"] == 1


def test_seeds_are_new_each_time(generate):
    seeds = [json.loads(generate("a cat", "--json", size="16x16").stdout)["seeds"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_files_are_kept_unless_overwritten(generate):
    Path("x.png").write_text("mine")
    kept = generate("a cat", "--output", "x.png", "--quiet")
    assert kept.stdout.split() == ["x-0001.png"]
    assert kept.stderr == "note: x.png is there and stays: written as x-0001.png; --overwrite replaces it\n"
    assert Path("x.png").read_text() == "mine"
    assert generate("a cat", "--output", "x.png", "--overwrite", "--quiet").stdout.split() == ["x.png"]
    assert read_parameters("x.png")["prompt"] == "a cat"
    assert pictures() == ["x-0001.png", "x.png"]


def test_dtype_and_free_modulation(generate):
    for name, options in (("a", []), ("b", ["--dtype", "bfloat16"]), ("c", ["--free-modulation"])):
        assert generate("a cat", "--seed", 1, "--output", f"{name}.png", *options).exit_code == 0
    assert read_parameters("b.png")["dtype"] == "bfloat16" and pixels("b.png") != pixels("a.png")
    assert pixels("c.png") == pixels("a.png")


def test_lightning_has_its_own_schedule(generate):
    assert generate("a cat", "--seed", 1, "--lightning", 4, "--output", "x.png", steps=None).exit_code == 0
    assert generate("a cat", "--seed", 1, "--cfg", 1, "--output", "plain.png", steps=4).exit_code == 0
    found = read_parameters("x.png")
    assert (found["lightning"], found["steps"], found["cfg"]) == (4, 4, 1.0)
    assert pixels("x.png") != pixels("plain.png")
    assert generate("--from-image", "x.png", "--output", "y.png", model=None, size=None, steps=None).exit_code == 0
    assert pixels("y.png") == pixels("x.png")


def test_a_lora_is_repeated(generate):
    key = "transformer_blocks.0.attn.to_q.lora_{}.weight"
    Path("a=b").mkdir()
    save_file({key.format("A"): torch.ones(2, 192), key.format("B"): torch.ones(192, 2)}, "a=b/x.safetensors")
    assert generate("a cat", "--seed", 1, "--output", "plain.png").exit_code == 0
    source = "a=b/x"
    for name, lora, scale in (("half", f"{source}.safetensors=0.5", 0.5), ("whole", f"{source}.safetensors", 1.0)):
        result = generate("a cat", "--seed", 1, "--lora", lora, "--output", f"{name}.png")
        assert result.exit_code == 0, result.output
        place = Path(f"{source}.safetensors").resolve()
        digest = hashlib.sha256(place.read_bytes()).hexdigest()
        assert read_parameters(f"{name}.png")["lora"] == [{"name": str(place), "scale": scale, "sha256": digest}]
        again = generate("--from-image", f"{name}.png", "--output", f"{name}2.png", model=None, size=None, steps=None)
        assert again.exit_code == 0, again.output
        assert "changed" not in again.stderr
        assert pixels(f"{name}2.png") == pixels(f"{name}.png") != pixels("plain.png")
    assert pixels("half.png") != pixels("whole.png")
    save_file({key.format("A"): torch.ones(2, 192), key.format("B"): 2 * torch.ones(192, 2)}, "a=b/x.safetensors")
    again = generate("--from-image", "half.png", "--output", "other.png", model=None, size=None, steps=None)
    assert f"the LoRA {place} has changed since half.png was made with it: the result will differ" in again.stderr
    for name in os.listdir():
        if name.endswith(".png"):
            os.remove(name)
    refused(generate("a cat", "--lora", "none.safetensors=x"), 2, "there is no LoRA file none.safetensors=x")
    refused(
        generate("a cat", "--lora", "a=b/x.safetensors=nan"),
        2,
        "--lora could not be read: Input should be a finite number",
    )


def test_loras_without_effect_and_twice_are_said(generate):
    key = "transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, 192), key.format("B"): torch.ones(192, 2)}, "x.safetensors")
    place = Path("x.safetensors").resolve()
    result = generate("a cat", "--lora", "x.safetensors=0", "--quiet", "-o", "none.png")
    assert result.exit_code == 0 and result.stderr == f"note: --lora {place} has no effect with the weight 0\n"
    twice = ("--lora", "x.safetensors", "--lora", f"{place}=0.5")
    result = generate("a cat", *twice, "--quiet", "-o", "twice.png", "-s", 1)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"note: --lora {place} is given 2 times: its weights add up to 1.5\n"
    once = generate("a cat", "--lora", "x.safetensors=1.5", "--quiet", "-o", "once.png", "-s", 1)
    assert once.exit_code == 0 and once.stderr == "" and pixels("once.png") == pixels("twice.png")


def test_the_tiny_model_has_its_own_size_and_steps(monkeypatch):
    """Which it draws in a second or two; a released model's would take minutes."""
    result = CliRunner().invoke(
        app, ["generate", '"HI" in red on a white ground', "--model", "tiny", "-s", "1", "-o", "x.png"]
    )
    assert result.exit_code == 0, result.output
    found = read_parameters("x.png")
    assert (found["width"], found["height"], found["steps"], found["cfg"]) == (128, 128, 20, 1.0)
    with Image.open("x.png") as image:
        assert image.size == (128, 128)


def test_short_options_and_a_folder_that_is_made(generate):
    args = ("-s", 4, "-n", 2, "-W", 48, "-H", 32, "-o", "new/folder/", "--quiet")
    result = generate("a cat", *args, size=None)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["new/folder/image-0001.png", "new/folder/image-0002.png"]
    found = read_parameters("new/folder/image-0002.png")
    assert (found["seed"], found["width"], found["height"]) == (5, 48, 32)


@pytest.mark.parametrize("mask", [False, True])
def test_a_picture_changed(generate, tiny_folder, mask):
    """The pipelines' own pictures, in the size of what goes in, and repeated to the byte from anywhere."""
    Image.effect_noise((40, 24), 90).convert("RGB").save("in.png")
    Image.linear_gradient("L").resize((40, 24)).save("mask.png")
    more = ("--mask", "mask.png") if mask else ()
    args = ("--image", "in.png", *more, "--strength", 0.5, "--cfg", 1, "-s", 3, "-o", "out.png", "--compare")
    result = generate("a cat", *args, size=None, steps=4)
    assert result.exit_code == 0, result.output
    cls = qwen_image_fast.QwenImageInpaintPipeline if mask else qwen_image_fast.QwenImageImg2ImgPipeline
    masked = {"mask_image": Image.open("mask.png")} if mask else {}
    pipe = cls.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    call = {"true_cfg_scale": 1.0, "strength": 0.5, "num_inference_steps": 4, "seed": 3, "progress": False}
    image = pipe("a cat", image=Image.open("in.png"), **masked, **call).images[0]
    assert pixels("out.png") == image.tobytes() and image.size == (40, 24)
    with Image.open("out-compare.png") as both:
        assert both.size == (40 + 8 + 40, 24)
    assert read_parameters("out.png")["kind"] == ("inpaint" if mask else "image_to_image")
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    again = generate("--from-image", "../out.png", "-o", "again.png", model=None, size=None, steps=None)
    assert again.exit_code == 0, again.output
    assert Path("again.png").read_bytes() == Path("../out.png").read_bytes()


def test_prompts_are_counted_and_written_as_they_are_done(generate, monkeypatch):
    """The file of the first prompt is there and named when the second begins."""
    Path("prompts.txt").write_text("a\nb\nc\n")
    real, there = pipelines.QwenImagePipeline.__call__, []

    def call(self, prompt, **kwargs):
        there.append(pictures())
        return real(self, prompt, **kwargs)

    monkeypatch.setattr(pipelines.QwenImagePipeline, "__call__", call)
    result = generate("--prompts-file", "prompts.txt", "-s", 1)
    assert result.exit_code == 0, result.output
    assert [len(names) for names in there] == [0, 1, 2]
    lines = result.stderr.splitlines()
    assert lines[0].startswith("load ")
    for n in (1, 2, 3):
        assert any(line.startswith(f"prompt {n} of 3, step 1/2, ") and line.endswith(" left") for line in lines), lines


def test_a_very_large_picture_is_announced_once(generate, monkeypatch):
    monkeypatch.setattr("qwen_image_fast.cli.pictures.MANY_TOKENS", 7)
    result = generate("a cat", size="64x32", steps=1)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("note:") == 1
    assert "note: 64x32 pixels with all that goes in are 8 tokens, 0.0 times those of 1328x1328" in result.stderr


@pytest.mark.parametrize(("size", "told", "expected"), [("64x32", None, 1), ("64x32", "3", 3), ("512x512", None, 3)])
def test_small_products_are_not_shared(generate, monkeypatch, size, told, expected):
    """8 and 1024 tokens of width 192, against a bound between them."""
    monkeypatch.setattr("qwen_image_fast.cli.threads.ENOUGH_TO_SHARE", 100 * 192**2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    torch.set_num_threads(3)
    used = []
    monkeypatch.setattr(pipelines.QwenImagePipeline, "__call__", lambda *_, **__: used.append(torch.get_num_threads()))
    generate("a cat", size=size)
    assert used == [expected]


# ---- what a picture says -----------------------------------------------------------------------------------------


def command_of(name):
    """The words of the command that `inspect` prints."""
    result = CliRunner().invoke(app, ["inspect", name, "--json"])
    assert result.exit_code == 0, result.output
    program, *words = shlex.split(json.loads(result.stdout)["command_line"])
    assert program == "qwen-image-fast"
    return words


@pytest.mark.parametrize("prompt", ["a cat", '-it\'s [bold] "quoted"'])
def test_inspect_prints_the_command_of_a_picture(generate, prompt):
    options = ("--cfg", 3, "--negative-prompt", "dogs", "-s", 9, "--max-sequence-length", 30, "-o", "x.png")
    assert generate(*options, "--", prompt).exit_code == 0
    shown = CliRunner().invoke(app, ["inspect", "x.png"])
    assert shown.exit_code == 0 and prompt in shown.stdout and "generate --from-image x.png" in shown.stdout
    assert re.search(r"^negative_prompt +dogs$", shown.stdout, re.M)
    result = CliRunner().invoke(app, [*command_of("x.png"), "-o", "y.png"] if prompt == "a cat" else
                                ["generate", "-o", "y.png", *command_of("x.png")[1:]])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Path("y.png").read_bytes() == Path("x.png").read_bytes()


def test_inspect_shows_a_space(generate):
    assert generate("a cat", "-o", "x.png").exit_code == 0
    shown = CliRunner().invoke(app, ["inspect", "x.png"])
    assert re.search(r"^negative_prompt +a space$", shown.stdout, re.M)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.png", "there is no picture none.png"),
        ("nome.png", "there is no picture nome.png; did you mean home.png?"),
        ("home.png", "home.png holds no parameters"),
        ("home.jpg", "home.jpg is not a PNG picture"),
    ],
)
def test_inspect_of_other_pictures(name, text):
    for place in ("home.png", "home.jpg"):
        Image.new("RGB", (8, 8)).save(place)
    result = CliRunner().invoke(app, ["inspect", name])
    assert result.exit_code == 2 and text in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_8_bits(generate, tiny_folder):
    """bfloat16 around the products, said in the picture, which is repeated by what it says; not for every device."""
    result = generate("a cat", "--seed", 11, "--precision", "int8", "--output", "x.png")
    assert result.exit_code == 0, result.output
    told = read_parameters("x.png")
    assert (told["precision"], told["dtype"]) == ("int8", "bfloat16")
    again = generate("--from-image", "x.png", "--output", "again.png", model=None, size=None, steps=None)
    assert again.exit_code == 0, again.output
    assert Path("again.png").read_bytes() == Path("x.png").read_bytes()
    generate("a cat", "--seed", 11, "--dtype", "bfloat16", "--output", "y.png")
    assert pixels("x.png") != pixels("y.png")
    result = generate("a cat", "--precision", "int5")
    assert result.exit_code == 2 and "int5" in result.stderr
