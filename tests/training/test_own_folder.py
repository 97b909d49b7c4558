"""Every command that fills a folder has it for itself, and keeps off a finished result."""

import json
import os

import pytest
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.files import claimed

COMMANDS = {
    "train": (["train", "tiny/1-shapes"], None),
    "cache-latents": (["cache-latents", "tiny/1-shapes"], "cache.json"),
    "data filter": (["data", "filter", "filter.yaml"], "audit.parquet"),
    "data annotate": (["data", "annotate", "annotate.yaml"], None),
    "evaluate text": (["evaluate", "text", "--count", "1"], "results.json"),
    "evaluate edit": (["evaluate", "edit", "--count", "1"], "results.json"),
}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "filter.yaml").write_text(json.dumps({"sources": [{"path": "pictures"}]}))
    (tmp_path / "annotate.yaml").write_text(json.dumps({"sources": [{"path": "pictures"}], "model": "stub"}))
    (tmp_path / "out").mkdir()


def refused(command, text):
    before = {name: os.stat(f"out/{name}").st_mtime_ns for name in os.listdir("out")}
    result = CliRunner().invoke(app, [*command, "--out", "out"])
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("error: ") and text in last, result.output
    assert before == {name: os.stat(f"out/{name}").st_mtime_ns for name in os.listdir("out")}


@pytest.mark.parametrize("name", COMMANDS)
def test_while_another_writes(name):
    with claimed("out"):
        refused(COMMANDS[name][0], "another process is writing to out")


@pytest.mark.parametrize("name", [name for name, (_, result) in COMMANDS.items() if result])
def test_over_a_result(name):
    command, result = COMMANDS[name]
    with open(f"out/{result}", "w") as file:
        file.write("mine")
    refused(command, f"out already has a finished {result}")


def test_previews_are_not_replaced():
    for name in ("preview.png", "preview-0001.png"):
        result = CliRunner().invoke(app, ["data", "preview", "--recipe", "tiny", "--count", "1"])
        assert result.exit_code == 0 and result.stdout.endswith(f" in {name}\n"), result.output
