"""Tests of the command run in a folder of their own, on one thread."""

import pytest
from typer.testing import CliRunner

from qwen_image_fast.cli import app


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def small_work(one_thread):
    pass


@pytest.fixture
def generate(tiny_folder):
    def run(*args, model=tiny_folder, size="64x32", steps=2):
        options = {"--model": model, "--size": size, "--steps": steps}
        flat = [str(x) for name, value in options.items() if value is not None for x in (name, value)]
        return CliRunner().invoke(app, ["generate", *flat, *map(str, args)])

    return run
