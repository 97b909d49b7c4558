"""Files of weights that are damaged, of another model or in another format: one sentence of the command for each."""

import json

import pytest
import torch
from cli_harness import refused
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from weights.writers import as_q8_0, write_gguf

from qwen_image_fast.cli import app
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.quantize import quantize
from qwen_image_fast.weights.formats import open_weights

WEIGHTS = SHIPPED / "transformer" / "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.1.attn.to_q"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    int8 = folder / "int8.safetensors"
    quantize(open_weights([WEIGHTS], "transformer"), int8)

    def with_another(name, tensor, change):
        state = load_file(int8)
        state[tensor] = change(state[tensor].clone()).contiguous()
        save_file(state, folder / f"{name}.safetensors")

    def no_number(scales):
        scales[7] = float("nan")
        return scales

    def nvfp4(text):
        said = json.dumps({**json.loads(bytes(text.tolist())), "format": "nvfp4"})
        return torch.tensor(list(said.encode()), dtype=torch.uint8)

    with_another("rows", f"{LAYER}.weight_scale", lambda scales: scales[:-1])
    with_another("nan", f"{LAYER}.weight_scale", no_number)
    with_another("nvfp4", f"{LAYER}.comfy_quant", nvfp4)
    tensors, _ = as_q8_0(load_file(WEIGHTS), "")
    for name, architecture in (("q8", "qwen_image"), ("llama", "llama")):
        write_gguf(folder / f"{name}.gguf", tensors, {"general.architecture": architecture})
    whole = (folder / "q8.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.safetensors").write_text("what I wanted to do\n")
    pair = {
        f"transformer.{LAYER}.lora_A.weight": torch.zeros(4, 192),
        f"transformer.{LAYER}.lora_B.weight": torch.zeros(192, 4),
    }
    save_file(pair, folder / "lora.safetensors")
    return folder


CASES = [
    ("llama.gguf", "", 2, "--transformer {file} is a GGUF of the architecture llama, not of a Qwen-Image transformer"),
    ("cut.gguf", "", 2, "bytes) is cut off: transformer_blocks."),
    ("rows.safetensors", "", 2, f"has {LAYER}.weight_scale of shape [191, 1], expected one number, one for each of"),
    (
        "rows.safetensors",
        "--precision int8",
        2,
        f"--transformer {{file}} is damaged or of an unknown tool: it has {LAYER}",
    ),
    (
        "nan.safetensors",
        "",
        1,
        f"{LAYER}.weight in {{file}} (int8 rotated 64) is not finite in torch.float32: its scales",
    ),
    ("nan.safetensors", "--precision int8", 1, "must hold finite numbers, got NaN or infinity: {file} is damaged"),
    ("nvfp4.safetensors", "--precision int8", 2, f"--transformer {{file}} holds {LAYER} as nvfp4, which is not read"),
    ("q8.gguf", "--precision int8", 2, "as GGUF Q8_0: load it without precision, or take a file in floating point"),
    (
        "int8.safetensors",
        "--precision int4",
        2,
        "as int8 rotated 64: load it with precision='int8' (--precision int8), or",
    ),
    ("int8.safetensors", "--precision int8 --memory 1MB", 1, "--memory must be at least "),
    ("lora.safetensors", "", 2, "those of a LoRA, which load_lora_weights (--lora) adds to a model"),
    ("notes.safetensors", "", 2, "notes.safetensors is a text, not a safetensors file"),
]


@pytest.mark.parametrize(("name", "words", "code", "sentence"), CASES)
def test_generate(files, name, words, code, sentence):
    given = ["generate", "x", "--model", "tiny", "--size", "64x64", "--steps", "2", "--quiet"]
    result = CliRunner().invoke(app, [*given, "--transformer", str(files / name), *words.split()])
    refused(result, code, sentence.format(file=files / name))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("int8.safetensors", "as int8 rotated 64: quantise the file in floating point that it was made of"),
        ("rows.safetensors", f"has {LAYER}.weight_scale of shape [191, 1]"),
    ],
)
def test_quantize(files, tmp_path, name, sentence):
    """A transformer's folder with such a file; what would be written is not there."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((SHIPPED / "transformer" / "config.json").read_bytes())
    (folder / WEIGHTS.name).symlink_to(files / name)
    result = CliRunner().invoke(app, ["quantize", str(folder), "-o", str(tmp_path / "out"), "--no-check"])
    assert result.exit_code == 2 and sentence in result.stderr, result.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(("name", "words", "code", "sentence"), [case for case in CASES[:4] if not case[1]])
def test_inspect(files, name, words, code, sentence):
    result = CliRunner().invoke(app, ["inspect", str(files / name)])
    assert result.exit_code == code, result.stdout
    assert sentence.format(file=files / name).removeprefix("--transformer ") in result.stderr
