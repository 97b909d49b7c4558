"""The command: what it writes, what it refuses, and with which exit code."""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.core import TyperGroup
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast import doctor
from qwen_image_fast.cli import app
from qwen_image_fast.png_metadata import read_parameters

pipelines = pytest.importorskip("qwen_image_fast.pipelines.text_to_image")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread():
    """Small work on a machine that runs other tests: threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generate(tiny_folder):
    def run(*args, model=tiny_folder, size="64x32", steps=2):
        options = {"--model": model, "--size": size, "--steps": steps}
        flat = [str(x) for name, value in options.items() if value is not None for x in (name, value)]
        return CliRunner().invoke(app, ["generate", *flat, *map(str, args)])

    return run


def pictures():
    return sorted(p.name for p in Path().iterdir() if p.suffix == ".png" or ".tmp" in p.name)


def pixels(name):
    with Image.open(name) as image:
        return image.tobytes()


def said(result):
    """Standard error without the lines of progress."""
    lines = result.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r", \d+:\d\d(, about \S+ left)?\n$", line))


def refused(result, code, text):
    """One sentence with our mark, the code, and nothing written."""
    assert result.exit_code == code, result.output
    assert said(result).startswith("error: ") and said(result).count("\n") == 1, result.stderr
    assert text in result.stderr
    assert pictures() == []


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
    assert generate("a cat", "--output", "x.png", "--quiet").stdout.split() == ["x-0001.png"]
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
        assert read_parameters(f"{name}.png")["lora"] == [
            {"name": str(Path(f"{source}.safetensors").resolve()), "scale": scale}
        ]
        again = generate("--from-image", f"{name}.png", "--output", f"{name}2.png", model=None, size=None, steps=None)
        assert again.exit_code == 0, again.output
        assert pixels(f"{name}2.png") == pixels(f"{name}.png") != pixels("plain.png")
    assert pixels("half.png") != pixels("whole.png")
    for name in os.listdir():
        if name.endswith(".png"):
            os.remove(name)
    refused(generate("a cat", "--lora", "none.safetensors=x"), 2, "there is no LoRA file none.safetensors=x")
    refused(
        generate("a cat", "--lora", "a=b/x.safetensors=nan"),
        2,
        "--lora could not be read: Input should be a finite number",
    )


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


def test_a_very_large_picture_is_announced(generate, monkeypatch):
    monkeypatch.setattr("qwen_image_fast.cli.pictures.MANY_TOKENS", 7)
    result = generate("a cat", size="64x32", steps=1)
    assert result.exit_code == 0, result.output
    assert "note: 64x32 pixels with all that goes in are 8 tokens, 0 times those of 1328x1328" in result.stderr


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
    result = CliRunner().invoke(app, [*command_of("x.png"), "-o", "y.png"] if prompt == "a cat" else
                                ["generate", "-o", "y.png", *command_of("x.png")[1:]])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Path("y.png").read_bytes() == Path("x.png").read_bytes()


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


# ---- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "nothing to make: give a prompt, --prompts-file or --from-image"),
        (["  "], "the prompt is empty"),
        (["x", "--size", "100x64"], "multiples of 16, got 100 in 100x64; try 96x64"),
        (["x", "--size", "0x64"], "width must be an integer, 16 to 8192, got 0"),
        (["x", "--size", "5:4"], "--size must be WIDTHxHEIGHT or one of 1:1, 16:9"),
        (["x", "--steps", "0"], "--steps"),
        (["x", "--steps", "two"], "--steps"),
        (["x", "--images", "0"], "--images"),
        (["x", "--seed", "-1"], "--seed"),
        (["x", "--cfg", "nan"], "--cfg"),
        (["x", "--cfg", "inf"], "--cfg must be a number, 0 to 100, got inf"),
        (["x", "--lightning", "6"], "--lightning must be 4 or 8, got 6"),
        (["x", "--dtype", "int8"], "--dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        (["x", "--device", "tpu"], "device"),
        (["x", "--device", "meta"], "--device must be auto, cpu, cuda or cuda:1 and so on, got meta"),
        (["x", "--device", "cuda"], "--device cuda cannot be used"),
        (["x", "--model", "no/such/folder"], "there is no folder no/such/folder"),
        (["x", "--model", "."], "has no model_index.json"),
        (["x", "--output", "missing/x.png"], "output missing/x.png: there is no folder missing"),
        (["x", "--output", "x.jpg"], "output x.jpg must be a .png file or a folder"),
        (["x", "--prompts-file", "prompts.txt"], "give either a prompt or --prompts-file, got both"),
        (["--prompts-file", "none.txt"], "there is no file none.txt"),
        (["--prompts-file", "prompts.txt"], "prompts.txt holds no prompt"),
        (["--prompts-file", "latin1.txt"], "latin1.txt could not be read as UTF-8 text"),
        (["--from-image", "none"], "none"),
        (["--from-image", "latin1.txt"], "latin1.txt is not a PNG picture"),
        (
            ["x", "--model", "tinny"],
            "there is no folder tinny, and it is not a hub name like owner/model; did you mean",
        ),
        (["x", "--size", "99999x99999"], "width must be an integer, 16 to 8192, got 99999"),
        (["x", "-W", "100"], "--width and --height must be multiples of 16, got 100 in 100x"),
        (["x", "-W", "64", "--size", "64x64"], "give either --size or --width and --height, got both"),
        (["--from-image", "latin.txt"], "there is no picture latin.txt; did you mean latin1.txt?"),
        (["--from-image", "."], ". is a folder; name a PNG picture in it"),
        (["--prompts-file", "prompt.txt"], "there is no file prompt.txt; did you mean prompts.txt?"),
        (["--prompts-file", "."], ". is a folder, not a file of prompts"),
        (["x", "--lora", "latin1.tx"], "there is no LoRA file latin1.tx; did you mean latin1.txt?"),
        (["x", "--lora", "a/b/c"], "there is no LoRA file or folder a/b/c"),
        (["x", "--strength", "0.5"], "--strength has no effect without --image"),
        (["x", "--mask", "latin1.txt"], "--mask needs --image, the picture to change"),
        (["x", "--image", "latin1.tx"], "there is no picture latin1.tx; did you mean latin1.txt?"),
        (
            ["x", "--image", "latin1.txt"],
            "latin1.txt could not be read as a picture: it is of no format that Pillow knows",
        ),
        (["x", "--compare"], "--compare has no effect without a picture"),
        (["x", "--batch", "2"], "--batch has no effect without --prompts-file"),
        (
            ["x", "--cfg", "1", "--negative-prompt", "y"],
            "--negative-prompt has no effect without guidance, a --cfg above 1",
        ),
        (["x", "--output", "folder"], "there is no folder folder; folder/ would be made"),
        (["x", "--frobnicate"], "--frobnicate"),
        (["x", "y"], "y"),
    ],
)
def test_bad_input(generate, args, text, monkeypatch):
    monkeypatch.setattr(doctor, "has_cuda_kernels", lambda: False)
    Path("prompts.txt").write_text("# nothing\n\n")
    Path("latin1.txt").write_bytes("é".encode("latin-1"))
    result = generate(*args, steps=None, size=None if {"-W", "--size"} & {*args} else "64x32")
    refused(result, 2, text)
    assert not re.search(r"Errno|\b[a-z]+_[a-z]+:", result.stderr), "no numbers of errors, no names of functions"


def test_unknown_command_and_none():
    result = CliRunner().invoke(app, ["frobnicate"])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and "frobnicate" in result.stderr
    group = CliRunner().invoke(app, ["data"])
    assert group.exit_code == 2 and "annotate" in group.output and "error" not in group.output
    nothing = CliRunner().invoke(app, [])
    assert nothing.exit_code == 2 and "generate" in nothing.stdout and nothing.stderr == ""


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"qwen-image-fast {qwen_image_fast.__version__}\n")


def test_a_damaged_model(generate, tiny_folder):
    folder = Path(shutil.copytree(tiny_folder, "model"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(generate("x", model=folder), 1, "is truncated or not safetensors")
    weights.unlink()
    refused(generate("x", model=folder), 1, "the folder has no safetensors file")


# ---- failures while it runs -------------------------------------------------------------------------------------


def test_no_space_before_the_work(generate, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=6000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr("qwen_image_fast.cli.pictures._load", lambda *args: pytest.fail("the model was loaded"))
    refused(generate("x"), 1, "no disk space for the output in .: 0.0 MB free")


def failing_save(error):
    def save(self, file, **kwargs):
        file.write(b"half")
        raise error

    return save


def test_the_disk_fills_up(generate, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", failing_save(OSError(28, "No space left on device")))
    result = generate("x", "--quiet")
    refused(result, 1, "the disk is full: image-0001.png could not be written")


def test_ctrl_c_while_writing_keeps_the_old_file(generate, monkeypatch):
    Path("x.jpg").write_text("old")
    Path("x.jpg").rename("x.png")
    monkeypatch.setattr(Image.Image, "save", failing_save(KeyboardInterrupt()))
    result = generate("x", "--output", "x.png", "--overwrite", "--quiet")
    assert result.exit_code == 130 and result.stderr == "interrupted\n"
    assert pictures() == ["x.png"] and Path("x.png").read_text() == "old"


def test_finished_pictures_stay_when_a_later_one_fails(generate, monkeypatch):
    Path("prompts.txt").write_text("a\nb\n")
    real = pipelines.QwenImagePipeline.__call__
    calls = []

    def call(self, prompt, **kwargs):
        calls.append(prompt)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, prompt, **kwargs)

    monkeypatch.setattr(pipelines.QwenImagePipeline, "__call__", call)
    result = generate("--prompts-file", "prompts.txt", "--quiet")
    assert result.exit_code == 130 and calls == ["a", "b"]
    assert pictures() == ["image-0001.png"] and result.stdout == "image-0001.png\n"


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        ((), "a smaller --size or --free-modulation needs less"),
        (("-n", 2, "--free-modulation"), "a smaller --size or fewer --images needs less"),
    ],
)
def test_advice_that_can_be_followed(generate, monkeypatch, args, advice):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(pipelines.QwenImagePipeline, "from_pretrained", fail)
    refused(generate("x", *args), 1, f"error: out of memory; {advice}")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "x/y"), "error: there is no file x/y\n"),
        (PermissionError(13, "Permission denied", "x/y"), "error: x/y: Permission denied\n"),
        (OSError(28, "the disk is full: x"), "error: the disk is full: x\n"),
        (FileNotFoundError("find_weights: x has no model.safetensors"), "error: x has no model.safetensors\n"),
        (MemoryError(), "error: out of memory; smaller pictures, or fewer at a time, need less ()\n"),
    ],
)
def test_no_numbers_of_errors_and_no_names_of_functions(monkeypatch, error, text):
    def fail():
        raise error

    monkeypatch.setattr(doctor, "environment", fail)
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.stderr) == (1, text)


@pytest.mark.parametrize(
    ("error", "text", "traceback"),
    [
        (KeyError("oops"), "error: KeyError: 'oops'", True),
        (RuntimeError("from [bold]deep[/bold] inside"), "error: RuntimeError: from [bold]deep[/bold] inside", True),
        (torch.OutOfMemoryError("tried 5 GiB"), "error: out of memory; a smaller --size", False),
        (MemoryError(), "error: out of memory; a smaller --size", False),
        (OSError("the file is gone"), "error: the file is gone", False),
    ],
)
def test_our_sentence_stands_on_top(generate, monkeypatch, error, text, traceback):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(pipelines.QwenImagePipeline, "from_pretrained", fail)
    result = generate("x")
    assert result.exit_code == 1 and said(result).startswith(text)
    assert ("Traceback" in result.stderr) == traceback


def test_the_pipelines_own_errors_are_sentences(generate, monkeypatch):
    from qwen_image_fast.pipelines.arguments import per_prompt

    def fail(self, *args):
        return per_prompt("height", [1, 2], 1)

    monkeypatch.setattr(pipelines.QwenImagePipeline, "_conditions", fail)
    refused(generate("x", "--quiet"), 1, "height must be one for all or one for each prompt, 1, got 2")


def test_ctrl_c_as_older_typer_reports_it(monkeypatch):
    def aborted(*args, **kwargs):
        raise typer.Abort

    monkeypatch.setattr(TyperGroup, "main", aborted)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 130


def test_ctrl_c_for_real(tiny_folder, tmp_path):
    """A process of its own, interrupted in the middle of sampling."""
    command = [sys.executable, "-m", "qwen_image_fast.cli", "generate", "a cat", "--model", str(tiny_folder)]
    command += ["--size", "192x192", "--steps", "1000", "--output", "x.png"]
    # As installed or from the source tree, and on one thread, as the other tests here.
    paths = [str(Path(qwen_image_fast.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=env, preexec_fn=heed)
    try:
        seen = b""
        deadline = time.monotonic() + 60
        # The bar shows at most ten states a second, so any step but the first may be the one that is seen.
        while not re.search(rb"\b[1-9]\d*/1000", seen) and time.monotonic() < deadline and process.poll() is None:
            seen += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()
    assert re.search(rb"\b[1-9]\d*/1000", seen)
    assert process.returncode == 130 and b"interrupted" in rest and b"Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
