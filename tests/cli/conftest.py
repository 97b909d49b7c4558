"""Tests of the command run in a folder of their own, on one thread."""

import pytest
import torch
from typer.testing import CliRunner

from qwen_image_fast.cli import app


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
