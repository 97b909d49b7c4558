"""What the interpreter counts of kernels, and that the estimates rest on it (benchmarks/gpu_counts.json)."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import gpu_counts
from qwen_image_fast.ops import gelu_tanh


def test_the_file_says_what_is_counted(kernels):
    """Within 5 %, as far as versions of nvcc differ; `python -m benchmarks.gpu_counts --update` writes it anew."""
    kept = json.loads(gpu_counts.TARGET.read_text(encoding="utf-8"))
    found = gpu_counts.count(kernels)
    assert not list(gpu_counts.differences(found, kept["now"], 0.05))
    # All that a row needs is asked for before any of it is used: of a first load follow the address or the segment.
    waits = {op: sides["forward"]["waits"] for op, sides in found.items()}
    assert waits["gelu_tanh"] == 1 and waits["layer_norm_modulate"] <= 2 and waits["gate_residual_norm_modulate"] <= 2


def test_what_is_counted(kernels):
    """Of one block of gelu: a read and a write of each value, one wait, every instruction by its name."""
    kernels.module.counts()
    gelu_tanh(torch.randn(2048).bfloat16())
    ((name, c),) = kernels.module.counts().items()
    assert "gelu_tanh_elements" in name and c["blocks"] == 1 and c["threads"] == 256 and c["waits"] == 1
    assert c["loaded"] == c["stored"] == 2 * 2048
    assert sum(c["by_name"].values()) == c["instructions"] and c["by_name"]["ld.global.v4.u32"] == 8
    assert kernels.module.counts() == {}


@pytest.mark.parametrize(("now", "words"), [(1.04, []), (1.06, ["a: 1.06, 1 in the file"])])
def test_differences(now, words):
    assert list(gpu_counts.differences({"a": now, "b": "x"}, {"a": 1, "b": "x"}, 0.05)) == words
    assert list(gpu_counts.differences({}, {"c": 1}, 0.05)) == ["c is only in the file"]
