"""The short scripts of examples/ do on the shipped model what they say."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qwen_image_fast.folders import SHIPPED

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def ink(path):
    """Mean colour of what is written on white."""
    found = pixels(path).reshape(-1, 3)
    return found[found.min(1) < 128].mean(0)


def test_generate(run):
    said = run("generate.py")
    assert pixels("picture-0.png").shape == (128, 128, 3) and pixels("picture-1.png").shape == (128, 192, 3)
    assert "picture-1.png  192x128  seed 8" in said
    assert ink("picture-0.png").argmax() == 0


def test_speed_up_diffusers(run):
    pytest.importorskip("diffusers")
    said = run("speed_up_diffusers.py")
    assert "transformer" in said
    assert float(said.rpartition("difference of a pixel: ")[2].split()[0]) < 1


def test_edit(run):
    run("edit.py")
    assert ink("before.png").argmax() == 0 and ink("after.png").argmax() == 2


def test_masked_edit(run):
    """The masked half turns blue, the other keeps its pixels."""
    run("masked_edit.py")
    before, after = pixels("before.png"), pixels("masked.png")
    assert np.abs(before - after)[:, :56].mean() < 2
    right = after[:, 72:].reshape(-1, 3)
    assert right[right.min(1) < 128].mean(0).argmax() == 2


@pytest.mark.parametrize("options", [("--precision", "int8"), ("--precision", "int4"), ("--limit", "16GB"), ()])
def test_less_memory(run, options):
    said = run("less_memory.py", *options)
    assert "GB of memory" in said and ink("less-memory.png").argmax() == 0


def test_lora(run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for block in range(5):
        for part, width in (("lora_A", (4, 192)), ("lora_B", (192, 4))):
            name = f"transformer.transformer_blocks.{block}.attn.to_q.{part}.weight"
            weights[name] = 0.5 * torch.randn(width, generator=generator)
    save_file(weights, tmp_path / "style.safetensors")
    run("lora.py", "style.safetensors")
    full, half, off = (pixels(f"lora-{name}.png") for name in ("1.0", "0.5", "off"))
    assert np.abs(full - off).mean() > np.abs(half - off).mean() > 0


def test_look_inside(run):
    said = run("look_inside.py", "--stop-after", 3)
    assert said.count("step ") == 3
    assert Path("looked-inside.png").exists()


def test_weights_of_others(run):
    """The shipped transformer itself, by its content."""
    [file] = (SHIPPED / "transformer").glob("*.safetensors")
    run("weights_of_others.py", file, "--model", "tiny", "--side", 128)
    assert ink("with-file.png").argmax() == 0
