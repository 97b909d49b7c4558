"""The command where the locale, or the encoding of its outputs, knows nothing but ASCII."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import qwen_image_fast
from qwen_image_fast.png_metadata import read_parameters, write_png

PATHS = [str(Path(qwen_image_fast.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
PLACES = {
    "ascii output": {"PYTHONIOENCODING": "ascii"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
    "nothing but ascii": {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
}
TINY = ["--size", "32x32", "--steps", "1", "--device", "cpu"]


@pytest.fixture(params=PLACES)
def run(request, tmp_path):
    env = {n: v for n, v in os.environ.items() if n not in ("LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8", "LC_CTYPE")}
    env |= {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1", **PLACES[request.param]}

    def run(*args):
        command = [sys.executable, "-m", "qwen_image_fast", *args]
        result = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=300)
        assert b"Traceback" not in result.stderr and b"Error" not in result.stderr, result.stderr.decode(
            errors="replace"
        )
        return result

    run.place = request.param
    return run


def test_a_picture_with_a_chinese_prompt_and_name(run, tmp_path, tiny_folder):
    result = run("generate", "一只猫", "--model", str(tiny_folder), *TINY, "--output", "猫.png")
    if run.place == "nothing but ascii":
        assert result.returncode == 2 and result.stderr.startswith(b"error: the prompt is not text"), result.stderr
        (tmp_path / "prompts.txt").write_text("一只猫\n", encoding="utf-8")
        again = ("generate", "--prompts-file", "prompts.txt", "--model", str(tiny_folder), *TINY)
        result = run(*again, "--output", "猫.png", "--json")
        assert json.loads(result.stdout)["images"][0]["prompt"] == "一只猫"
    assert result.returncode == 0, result.stderr
    assert read_parameters(tmp_path / "猫.png")["prompt"] == "一只猫"
    with open(tmp_path / "猫.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_help_inspect_and_errors(run, tmp_path, tiny_folder):
    for command in ("--help", "train --help", "data --help"):
        assert run(*command.split()).returncode == 0
    (tmp_path / "模型").symlink_to(tiny_folder)
    inspected = run("inspect", "模型")
    assert inspected.returncode == 0 and b"transformer" in inspected.stdout
    for args in (
        ["train", "食谱"],
        ["generate", "x", "--model", "模型/没有"],
        ["generate", "x", "--size", "大"],
        ["画"],
    ):
        failed = run(*args)
        assert failed.returncode == 2 and b"\nerror: " in b"\n" + failed.stderr, failed.stderr


def test_a_name_that_is_no_text(tmp_path):
    """A file's name is bytes; it comes back from the picture's parameters as it was."""
    name = os.fsdecode(b"caf\xe9.png")
    parameters = {
        "model": "tiny", "prompt": "猫", "negative_prompt": " ", "width": 8, "height": 8, "steps": 1, "cfg": 1.0,
        "seed": 1, "max_sequence_length": 8, "dtype": "float32", "lightning": None, "image": [name], "command": "edit",
    }  # fmt: skip
    write_png(tmp_path / "x.png", Image.new("RGB", (8, 8)), parameters)
    assert read_parameters(tmp_path / "x.png")["image"] == [name]
