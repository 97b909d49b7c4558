"""--memory: plans on the command line, before anything is loaded."""

import json

import pytest
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.pipelines import residence


def run(*words):
    return CliRunner().invoke(app, list(words))


def test_inspect_prints_the_plan(monkeypatch):
    monkeypatch.setattr(residence, "resident_bytes", lambda: 0)
    found = run("inspect", "tiny", "--memory", "3GB", "--json")
    plan = json.loads(found.stdout)["plan"]
    assert found.exit_code == 0 and plan["peak"].endswith("of 3.0 GB") and "buffers" not in plan
    found = run("inspect", "tiny", "--memory", "3GB", "--dtype", "float32")
    assert found.exit_code == 0 and "Under 3.0 GB, in float32" in found.stdout and "transformer, blocks" in found.stdout
    found = run("inspect", "tiny", "--memory", "3GB", "--precision", "int4")
    assert found.exit_code == 0 and "layers in int4" in found.stdout and "transformer, blocks" not in found.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("inspect", "tiny", "--precision", "int8"), "--precision has no effect without --memory"),
        (("inspect", "tiny", "--memory", "3GB", "--precision", "int2"), "--precision must be int8 or int4, got int2"),
        (("inspect", "tiny", "--memory", "1MB"), "--memory must be at least"),
        (("inspect", "tiny", "--memory", "much"), "--memory must be a positive number of bytes or a string like '4GB'"),
        (("generate", "a fox", "--memory", "-3"), "--memory must be a positive number of bytes or a string like '4GB'"),
    ],
)
def test_bad_limits(words, sentence):
    found = run(*words)
    assert found.exit_code == 2 and sentence in found.stderr
