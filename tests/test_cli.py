"""The command: what it writes, what it refuses, and with which exit code."""

import functools
import json
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
from PIL import Image
from safetensors.torch import save_file
from typer.core import TyperGroup
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast import doctor
from qwen_image_fast.cli import app
from qwen_image_fast.cli.generate import RATIOS, parse_size
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


def refused(result, code, text):
    """One sentence with our mark, the code, and nothing written."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
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
        "lightning": None,
        "lora": None,
        "device": "cpu",
        "command": "generate",
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
    """Defaults included: guidance against a single space."""
    generate("a cat", "--seed", 11, "--output", "x.png")
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
    for name, lora in (("half", "a=b/x.safetensors=0.5"), ("whole", "a=b/x.safetensors")):
        result = generate("a cat", "--seed", 1, "--lora", lora, "--output", f"{name}.png")
        assert result.exit_code == 0, result.output
        assert read_parameters(f"{name}.png")["lora"] == [lora]
        again = generate("--from-image", f"{name}.png", "--output", f"{name}2.png", model=None, size=None, steps=None)
        assert again.exit_code == 0, again.output
        assert pixels(f"{name}2.png") == pixels(f"{name}.png") != pixels("plain.png")
    assert pixels("half.png") != pixels("whole.png")
    for name in os.listdir():
        if name.endswith(".png"):
            os.remove(name)
    refused(generate("a cat", "--lora", "none.safetensors=x"), 2, "there is no folder none.safetensors=x")
    refused(generate("a cat", "--lora", "a=b/x.safetensors=nan"), 2, "adapter_weights must be finite")


def test_sizes():
    assert parse_size("1664x928") == parse_size("1664X928") == parse_size("16:9") == (1664, 928)
    assert all(w % 16 == h % 16 == 0 for w, h in RATIOS.values())
    for ratio, (w, h) in RATIOS.items():
        a, b = map(int, ratio.split(":"))
        assert abs(w / h / (a / b) - 1) < 0.01


# ---- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "nothing to make: give a prompt, --prompts-file or --from-image"),
        (["  "], "the prompt is empty"),
        (["x", "--size", "100x64"], "multiples of 16, got 100 in 100x64; try 96x64"),
        (["x", "--size", "0x64"], "multiples of 16, got 0"),
        (["x", "--size", "5:4"], "--size must be WIDTHxHEIGHT or one of 1:1, 16:9"),
        (["x", "--steps", "0"], "--steps"),
        (["x", "--steps", "two"], "--steps"),
        (["x", "--images", "0"], "--images"),
        (["x", "--seed", "-1"], "--seed"),
        (["x", "--cfg", "nan"], "--cfg"),
        (["x", "--cfg", "inf"], "--cfg must be a finite number, got inf"),
        (["x", "--lightning", "6"], "--lightning must be 4 or 8, got 6"),
        (["x", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got int8"),
        (["x", "--device", "tpu"], "device"),
        (["x", "--device", "meta"], "--device must be auto, cpu or cuda, got meta"),
        (["x", "--device", "cuda"], "--device cuda cannot be used"),
        (["x", "--model", "no/such/folder"], "there is no folder no/such/folder"),
        (["x", "--model", "."], "has no model_index.json"),
        (["x", "--output", "missing/x.png"], "output missing/x.png must be a .png file in an existing folder"),
        (["x", "--output", "x.jpg"], "output x.jpg must be a .png file in an existing folder"),
        (["x", "--prompts-file", "prompts.txt"], "give either a prompt or --prompts-file, got both"),
        (["--prompts-file", "none.txt"], "none.txt could not be read"),
        (["--prompts-file", "prompts.txt"], "prompts.txt holds no prompt"),
        (["--prompts-file", "latin1.txt"], "latin1.txt could not be read as UTF-8 text"),
        (["--from-image", "none"], "none"),
        (["--from-image", "latin1.txt"], "latin1.txt is not a PNG picture"),
        (["x", "--frobnicate"], "--frobnicate"),
        (["x", "y"], "y"),
    ],
)
def test_bad_input(generate, args, text, monkeypatch):
    monkeypatch.setattr(doctor, "has_cuda_kernels", lambda: False)
    Path("prompts.txt").write_text("# nothing\n\n")
    Path("latin1.txt").write_bytes("é".encode("latin-1"))
    refused(generate(*args, steps=None), 2, text)


def test_unknown_command_and_none():
    result = CliRunner().invoke(app, ["frobnicate"])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and "frobnicate" in result.stderr
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
    monkeypatch.setattr(
        sys.modules["qwen_image_fast.cli.generate"], "_load", lambda *args: pytest.fail("the model was loaded")
    )
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
    assert result.exit_code == 130 and calls == [["a"], ["b"]]
    assert pictures() == ["image-0001.png"] and result.stdout == "image-0001.png\n"


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
    assert result.exit_code == 1 and result.stderr.startswith(text)
    assert ("Traceback" in result.stderr) == traceback


def test_the_pipelines_own_errors_are_sentences(generate, monkeypatch):
    from qwen_image_fast.pipelines.request import per_prompt

    def fail(self, tokens):
        return per_prompt("height", [1, 2], 1)

    monkeypatch.setattr(pipelines.QwenImagePipeline, "_check_finite", fail)
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
