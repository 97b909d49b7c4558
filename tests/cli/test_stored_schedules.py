"""A transformer without modulation weights draws by the schedules of its file; others are refused before it is read."""

import shutil

import pytest
import torch
from cli_harness import refused
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import qwen_image_fast as q
from qwen_image_fast.cli import app
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.stored_modulation import SCHEDULES
from qwen_image_fast.quantize import quantize
from qwen_image_fast.quantize_modulation import schedules_for
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler
from qwen_image_fast.tensor_files import read_header
from qwen_image_fast.weights.formats import open_weights

NAME = "diffusion_pytorch_model.safetensors"
KNOWN = "its vectors are for 3 steps of 64x64; 4 steps of any size with Lightning, not for"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Of 3 steps at 64x64, and of Lightning."""
    found = tmp_path_factory.mktemp("small") / NAME
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(SHIPPED, subfolder="scheduler")
    schedules = schedules_for(scheduler, [3], [(64, 64)], [4])
    quantize(open_weights([SHIPPED / "transformer" / NAME], "transformer"), found, schedules=schedules)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("picture.jpg")


@pytest.fixture
def unread(monkeypatch):
    """Nothing of a model may be loaded."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    for cls in (q.QwenImagePipeline, q.QwenImageEditPlusPipeline, q.QwenImageImg2ImgPipeline):
        monkeypatch.setattr(cls, "from_pretrained", load)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("generate", "--size 64x64 --steps 4", f"{KNOWN} 4 steps of 64x64: take such a schedule, or make a file for "
         "this one, by `qwen-image-fast quantize MODEL --out FOLDER --drop-modulation --steps 4 --size 64x64`"),
        ("generate", "--size 512x512 --steps 3", f"{KNOWN} 3 steps of 512x512: take such"),
        ("generate", "--lightning 8", f"{KNOWN} 8 steps of 128x128 with Lightning: take such a schedule, or "
         "make a file for this one, by `qwen-image-fast quantize MODEL --out FOLDER --drop-modulation --lightning 8`"),
        ("generate", "--image picture.jpg --steps 20", f"{KNOWN} 20 steps of 64x64"),
        ("edit", "--image picture.jpg --steps 5", f"{KNOWN} 5 steps of 64x64"),
        ("edit", "--image picture.jpg --steps 3 --megapixel", f"{KNOWN} 3 steps of 1024x1024"),
        ("generate", "--size 64x64 --steps 3 --dtype float32", "dtype must be bfloat16, in which its modulation"),
    ],
)  # fmt: skip
def test_another_schedule_is_refused_before_the_model_is_read(file, here, unread, command, words, sentence):
    small = [] if "--dtype" in words else ["--precision", "int8"]
    result = run(command, "x", "--model", "tiny", "--transformer", file, *small, *words.split())
    refused(result, 2, sentence)
    assert f"--transformer {file}: the " in result.stderr


def test_a_folder_with_such_a_transformer(file, here, unread, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder)
    shutil.copy(file, folder / "transformer" / NAME)
    result = run("generate", "x", "--model", folder, "--size", "64x64", "--steps", "9", "--precision", "int8")
    refused(
        result, 2, f"--model {folder}: the modulation weights were left out of this transformer, and {KNOWN} 9 steps"
    )


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_a_lora_on_modulation(file, here, unread, command):
    layer = "transformer.transformer_blocks.0.img_mod.1"
    pair = {f"{layer}.lora_A.weight": torch.ones(2, 192), f"{layer}.lora_B.weight": torch.ones(6 * 192, 2)}
    save_file(pair, "lora.safetensors")
    words = ["x", "--size", "64x64", "--steps", 3] if command == "generate" else ["--port", 0]
    given = ["--model", "tiny", "--transformer", file, "--precision", "int8", "--lora", "lora.safetensors"]
    result = run(command, *words, *given)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    said = "transformer_blocks.0.img_mod.1 cannot be changed, since the modulation weights were left out of this transf"
    assert said in result.stderr, result.stderr


def test_the_folder_of_a_transformer_alone(file, here):
    result = run("generate", "x", "--model", file.parent)
    refused(
        result,
        2,
        f"it has no model_index.json; a transformer alone goes with a pipeline's folder: --transformer {file}",
    )


def test_what_is_stored_is_drawn(file, here):
    same = ["x", "--model", "tiny", "--transformer", file, "--precision", "int8", "--seed", 0, "--quiet"]
    for name, words in (("own", ("--size", "64x64", "--steps", 3)), ("fast", ("--size", "96x64", "--lightning", 4))):
        result = run("generate", *same, *words, "--output", f"{name}.png")
        assert result.exit_code == 0, result.stderr
    result = run("edit", *same, "--image", "picture.jpg", "--steps", 3, "--output", "edit.png")
    assert result.exit_code == 0, result.stderr


def test_schedules_that_cannot_be_read(file, here, unread):
    """The list of schedules is overwritten where it lies."""
    shutil.copy(file, "damaged.safetensors")
    place = read_header("damaged.safetensors")[SCHEDULES]
    with open("damaged.safetensors", "r+b") as damaged:
        damaged.seek(place.start)
        damaged.write(b"\0" * 8)
    result = run("generate", "x", "--model", "tiny", "--transformer", "damaged.safetensors", "--precision", "int8")
    refused(result, 2, "modulation_schedules must be the bytes of a json of schedules")
