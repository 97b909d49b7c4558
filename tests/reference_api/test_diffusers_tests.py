"""The runner of diffusers' own tests, on folders with a few that say which classes they see and how they end."""

import json

import pytest
from tests.reference_api.diffusers_tests import outcomes

ENDS = """
import os
import time
from pathlib import Path

import pytest


@pytest.fixture
def broken():
    yield
    raise RuntimeError("broken after it")


def test_passes():
    with Path("runs").open("a") as runs:
        runs.write("once ")


def test_fails():
    assert 1 == 2, "of course"


def test_ends_the_process():
    os._exit(7)


@pytest.mark.xfail
def test_known():
    assert False


@pytest.mark.skip(reason="to see it named")
def test_skipped():
    pass


def test_broken(broken):
    pass
"""
SLOW = """
import time


def test_never_ends():
    while True:
        time.sleep(1)
"""
CLASSES = """
from diffusers import QwenImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen2VLProcessor


def small():
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1, "joint_attention_dim": 8}
    return QwenImageTransformer2DModel(**sizes, in_channels=4, out_channels=1, axes_dims_rope=(4, 6, 6))


def test_is_stand_alone():
    assert type(small()).__module__.startswith("qwen_image_fast.models")


def test_is_accelerated():
    assert type(small()) is not QwenImageTransformer2DModel


def test_loads_no_part_of_the_hub():
    name = "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration"
    assert Qwen2Tokenizer.from_pretrained(name)("a").input_ids and Qwen2VLProcessor.from_pretrained(name)
"""


def folder(path, **files):
    for name, text in files.items():
        (path / f"test_{name}.py").write_text(text)
    return path


def short(found):
    return {name.split("::test_")[1]: told["outcome"] for name, told in found.items()}


def test_every_test_has_an_outcome_and_is_run_once(tmp_path):
    """Also those behind one that ends the process, and once more where it was stopped from outside."""
    snapshot, file = folder(tmp_path, ends=ENDS), tmp_path / "kept.jsonl"
    found = outcomes(snapshot, file)
    assert short(found) == {
        "passes": "passed", "fails": "failed", "ends_the_process": "ended the process with 7",
        "known": "skipped, as expected to fail", "skipped": "skipped", "broken": "failed",
    }  # fmt: skip
    said = {name.split("::test_")[1]: told.get("said", "") for name, told in found.items()}
    assert "of course" in said["fails"] and "to see it named" in said["skipped"] and "broken after" in said["broken"]
    with file.open("a") as lines:
        lines.write(json.dumps({"test": "test_ends.py::test_known", "outcome": "began"}) + "\n")
    assert short(outcomes(snapshot, file)) == short(found)
    assert (snapshot / "runs").read_text() == "once "


def test_a_slow_test_is_ended(tmp_path):
    found = outcomes(folder(tmp_path, slow=SLOW), tmp_path / "kept.jsonl", limit=0.1)
    assert short(found) == {"never_ends": "ran past 0.1 s"}


def test_a_folder_without_tests_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="pytest ended with 5"):
        outcomes(tmp_path, tmp_path / "kept.jsonl")


@pytest.mark.parametrize(("classes", "passing"), [("stand-alone", "is_stand_alone"), ("accelerated", "is_accelerated")])
def test_classes(tmp_path, classes, passing):
    pytest.importorskip("diffusers")
    found = outcomes(folder(tmp_path, which=CLASSES), tmp_path / "kept.jsonl", "-p", "swapped", "--classes", classes)
    other = {"is_stand_alone", "is_accelerated"} - {passing}
    assert short(found) == {passing: "passed", other.pop(): "failed", "loads_no_part_of_the_hub": "passed"}
