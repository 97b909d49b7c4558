"""The command: what it refuses, how it is interrupted, and with which exit code."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from cli_harness import pictures, refused, said
from PIL import Image
from typer.core import TyperGroup
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast import doctor
from qwen_image_fast.cli import app
from qwen_image_fast.pipelines import text_to_image as pipelines

# ---- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "nothing to make: give a prompt, --prompts-file or --from-image"),
        (["  "], "the prompt is empty"),
        (["x", "--size", "100x64"], "must be a multiple of 16 pixels, got 100; try 96"),
        (["x", "--size", "0x64"], "width must be an integer, 16 to 8192, got 0"),
        (["x", "--size", "5:4"], "--size must be WIDTHxHEIGHT or one of 1:1, 16:9"),
        (["x", "--steps", "0"], "--steps"),
        (["x", "--steps", "two"], "--steps"),
        (["x", "--images", "0"], "--images"),
        (["x", "--seed", "-1"], "--seed"),
        (["x", "--cfg", "nan"], "--cfg"),
        (["x", "--cfg", "inf"], "--cfg must be a number, 1 to 100, got inf"),
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
        (["--prompts-file", "latin1.txt"], "latin1.txt is not text in UTF-8, as line 1 shows; save it as UTF-8"),
        (["--prompts-file", "gbk.txt"], "gbk.txt is not text in UTF-8, as line 2 shows; save it as UTF-8"),
        (
            ["x", "--output", "latin1.txt/"],
            "--output latin1.txt/ must be a folder, latin1.txt is a file: leave the / o",
        ),
        (["x", "--output", "latin1.txt/a/"], "the folder latin1.txt/a could not be made: a part of it is a file"),
        (["--from-image", "none"], "none"),
        (["--from-image", "latin1.txt"], "latin1.txt is not a PNG picture"),
        (
            ["x", "--model", "tinny"],
            "there is no folder tinny, and it is not a hub name like owner/model; did you mean",
        ),
        (["x", "--size", "99999x99999"], "width must be an integer, 16 to 8192, got 99999"),
        (["x", "-W", "100"], "must be a multiple of 16 pixels, got 100; try 96"),
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
            "latin1.txt could not be read as a picture: its type is not known",
        ),
        (["x", "--compare"], "--compare has no effect without a picture"),
        (["x", "--batch", "2"], "--batch has no effect without --prompts-file"),
        (
            ["x", "--cfg", "1", "--negative-prompt", "y"],
            "--negative-prompt has no effect without guidance, a --cfg above 1",
        ),
        (["x", "--output", "folder"], "there is no folder folder; folder/ would be made"),
        (["x", "--frobnicate"], "--frobnicate"),
        (
            ["x", "y"],
            "(y): generate takes one prompt; put quotes around one of several words, or give several by --prompts-file",
        ),
    ],
)
def test_bad_input(generate, args, text, monkeypatch):
    monkeypatch.setattr(doctor, "has_cuda_kernels", lambda: False)
    Path("prompts.txt").write_text("# nothing\n\n")
    Path("latin1.txt").write_bytes("é".encode("latin-1"))
    Path("gbk.txt").write_bytes("a cat\n一只红色的猫\n".encode("gbk"))
    result = generate(*args, steps=None, size=None if {"-W", "--size"} & {*args} else "64x32")
    refused(result, 2, text)
    assert not re.search(r"Errno|codec|\b[a-z]+_[a-z]+:", result.stderr), "no numbers of errors, no names of functions"


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (
            "edit make it",
            "edit takes one prompt; put quotes around one of several words, or give several by --prompts-f",
        ),
        ("layers a.png b.png", "layers takes one image; put quotes around one of several words\n"),
        ("inspect a b", "inspect takes one what; put quotes"),
        ("doctor please", " (please)\n"),
    ],
)
def test_words_too_many(args, advice):
    result = CliRunner().invoke(app, args.split())
    assert result.exit_code == 2 and advice in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "args, text",
    [
        ("generate x --force", "there is no option --force of generate; did you mean --overwrite?"),
        ("serve --model tiny --force", "there is no option --force of serve; --help shows those that there are"),
        ("edit x --stesp 3", "there is no option --stesp of edit; did you mean --steps?"),
    ],
)
def test_unknown_options(args, text):
    result = CliRunner().invoke(app, args.split())
    assert result.exit_code == 2 and text in result.stderr, result.stderr


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
        ((), "a smaller --size or --free-modulation or --memory needs less"),
        (("-n", 2, "--free-modulation"), "a smaller --size or fewer --images or --memory needs less"),
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
    assert (result.exit_code, said(result)) == (1, text)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_real(tiny_folder, tmp_path, number):
    """A process of its own, interrupted in the middle of sampling."""
    command = [sys.executable, "-m", "qwen_image_fast", "generate", "a cat", "--model", str(tiny_folder)]
    command += ["--size", "192x192", "--steps", "1000", "--output", "x.png"]
    # As installed or from the source tree, and on one thread, as the other tests here.
    paths = [str(Path(qwen_image_fast.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env=env, preexec_fn=heed)
    try:
        seen = b""
        deadline = time.monotonic() + 600
        # The bar shows at most ten states a second, so any step but the first may be the one that is seen.
        while not re.search(rb"\b[1-9]\d*/1000", seen) and time.monotonic() < deadline and process.poll() is None:
            seen += os.read(process.stderr.fileno(), 4096)
        process.send_signal(number)
        rest = process.communicate(timeout=600)[1]
    finally:
        process.kill()
        process.wait()
    assert re.search(rb"\b[1-9]\d*/1000", seen)
    assert process.returncode == 128 + number and b"interrupted" in rest and b"Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
