"""`quantize`: the file that it writes, going on after an interruption, LoRAs, the report, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from weights.writers import as_q8_0, write_gguf

from qwen_image_fast import quantize as module
from qwen_image_fast import quantize_report
from qwen_image_fast.cli import app
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.int8_linear import Int8Linear
from qwen_image_fast.models.lora_kinds import Adapter, Pair
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.quantize import METADATA, quantize
from qwen_image_fast.tensor_files import read_header, read_metadata
from qwen_image_fast.weights.formats import open_weights

WEIGHTS = SHIPPED / "transformer" / "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.1.attn.to_out.0"


def opened():
    return open_weights([WEIGHTS], "transformer")


def read(file, **options):
    return QwenImageTransformer2DModel.from_single_file(file, config=SHIPPED, **options)


def adapter():
    g = torch.Generator().manual_seed(0)
    return Adapter(Pair(torch.randn(4, 192, generator=g) / 14, torch.randn(192, 4, generator=g) / 4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("quantize") / "model.safetensors"
    errors = quantize(opened(), file, about={"model": "tiny"})
    return file, errors


def test_the_file(whole):
    """What `from_pretrained(precision="int8")` makes of the same weights, bit by bit; every other tensor as it was."""
    file, errors = whole
    model = read(file, precision="int8")
    wanted = QwenImageTransformer2DModel.from_pretrained(
        SHIPPED, subfolder="transformer", precision="int8"
    ).state_dict()
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in wanted.items()}
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
    assert len(errors) == 60
    assert all(0.003 < error < 0.02 for error in errors.values())
    told = json.loads(read_metadata(file)[METADATA])
    assert (told["precision"], told["rotation"], told["model"]) == ("int8", "ConvRot", "tiny")
    for entry in read_header(file).values():
        assert entry.start % entry.dtype.itemsize == 0
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_file_in_4_bits(tmp_path):
    """What `from_pretrained(precision="int4")` makes of the same weights, bit by bit."""
    file = tmp_path / "model.safetensors"
    errors = quantize(opened(), file, precision="int4")
    wanted = QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", precision="int4")
    state, model = wanted.state_dict(), read(file, precision="int4")
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(model.get_submodule(LAYER).int8.packed, wanted.get_submodule(LAYER).int8.packed)
    assert len(errors) == 60
    for path, error in errors.items():
        low, high = (0.003, 0.02) if ".4." in path else (0.05, 0.09)
        assert low < error < high, path
    assert json.loads(read_metadata(file)[METADATA])["precision"] == "int4"
    assert model.get_submodule(LAYER).int8.packed.nbytes == 192 * 192 * 9 // 16
    with pytest.raises(
        ValueError, match="is quantised already, .* as int4 groups of 16.*: load it with precision='int4' "
    ):
        read(file, precision="int8")


def test_a_file_in_float8(tmp_path):
    """A scale for each weight, whose largest number is 448; read as floating point, half as large as bfloat16."""
    file = tmp_path / "model.safetensors"
    errors = quantize(opened(), file, precision="fp8")
    assert len(errors) == 60 and all(0.01 < error < 0.04 for error in errors.values())
    exact = QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", torch_dtype=torch.float32)
    weight, model = exact.get_submodule(LAYER).weight, read(file, torch_dtype=torch.float32)
    scale = weight.abs().max() / 448
    wanted = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(model.get_submodule(LAYER).weight, wanted)
    entries = read_header(file)
    assert entries[f"{LAYER}.weight"].dtype == torch.float8_e4m3fn and entries[f"{LAYER}.weight_scale"].shape == ()
    assert entries[f"{LAYER}.weight"].nbytes == weight.numel()
    told = json.loads(read_metadata(file)[METADATA])
    assert told["precision"] == "fp8" and "rotation" not in told
    with pytest.raises(ValueError, match="is quantised already"):
        read(file, precision="int8")


def test_zero_weights_in_float8():
    assert not module.to_float8(torch.zeros(2, 3))["weight"].float().any()


@pytest.mark.parametrize("cut", [False, True])
def test_going_on(tmp_path, monkeypatch, whole, cut):
    """Only what is missing is made again; a line that was cut off counts as missing."""
    file, convert, made = tmp_path / "model.safetensors", module._convert, []

    def until(most):
        def run(name, *args):
            if len(made) == most:
                raise KeyboardInterrupt
            made.append(name)
            return convert(name, *args)

        return run

    monkeypatch.setattr(module, "_convert", until(100))
    with pytest.raises(KeyboardInterrupt):
        quantize(opened(), file, about={"model": "tiny"})
    assert not file.exists()
    if cut:
        journal = tmp_path / ".model.safetensors.journal"
        journal.write_bytes(journal.read_bytes()[:-3])
    first = list(made)
    monkeypatch.setattr(module, "_convert", until(10_000))
    errors = quantize(opened(), file, about={"model": "tiny"})
    again = made[100:]
    assert again[0] == (first[-1] if cut else again[0]) and len(set(first) & set(again)) == int(cut)
    assert file.read_bytes() == whole[0].read_bytes() and errors == whole[1]


def test_what_was_left_of_other_work_is_not_gone_on_with(tmp_path, monkeypatch, whole):
    file, convert = tmp_path / "model.safetensors", module._convert
    monkeypatch.setattr(module, "_convert", lambda name, *args: convert(name, *args) if "0" in name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(opened(), file, [({LAYER: adapter()}, 1.0)], {"model": "other"})
    monkeypatch.setattr(module, "_convert", convert)
    quantize(opened(), file, about={"model": "tiny"})
    assert file.read_bytes() == whole[0].read_bytes()


def test_loras_are_merged_first(tmp_path, whole):
    file = tmp_path / "model.safetensors"
    quantize(opened(), file, [({LAYER: adapter()}, 0.5)])
    exact = QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer", torch_dtype=torch.float32)
    plain, merged = (read(f, precision="int8").get_submodule(LAYER).dequantised() for f in (whole[0], file))
    wanted = exact.get_submodule(LAYER).weight + 0.5 * adapter().delta(torch.empty(0))
    assert ((merged - wanted).norm() / wanted.norm()) < 0.015 < ((merged - plain).norm() / wanted.norm())


def test_what_is_refused(tmp_path):
    state = QwenImageTransformer2DModel.from_pretrained(SHIPPED, subfolder="transformer").state_dict()
    tensors, _ = as_q8_0(state, "")
    path = write_gguf(tmp_path / "model.gguf", tensors, {"general.architecture": "qwen_image"})
    with pytest.raises(
        ValueError, match="model.gguf is quantised already, .* as GGUF Q8_0: quantise the file in float"
    ):
        quantize(open_weights([path], "transformer"), tmp_path / "x.safetensors")
    state[f"{LAYER}.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"{LAYER}.weight must hold finite numbers"):
        quantize(open_weights([tmp_path / "bad.safetensors"], "transformer"), tmp_path / "y.safetensors")


def test_the_command(tmp_path):
    lora = tmp_path / "lora.safetensors"
    down, up = adapter().change
    names = ("lora_A.weight", "lora_B.weight")
    save_file({f"transformer.{LAYER}.{n}": t.contiguous() for n, t in zip(names, (down, up))}, lora)
    out = tmp_path / "out"
    run = CliRunner().invoke
    words = ["quantize", "tiny", "--out", str(out), "--lora", f"{lora}=0.5", "--json"]
    result = run(app, words)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "quantization.json").read_text())
    assert report["layers"] == 60 and report["loras"][0]["scale"] == 0.5
    assert all(0 < error < 0.05 for error in report["velocity_errors"].values())
    assert set(map(float, report["velocity_errors"])) == set(quantize_report.SIGMAS)
    model = QwenImageTransformer2DModel.from_pretrained(out, precision="int8")
    assert isinstance(model.get_submodule(LAYER), Int8Linear)
    there = run(app, words[:-1])
    assert there.exit_code == 2 and "has a finished quantization.json" in there.stderr.replace("\n", " ")
    assert "loading torch" not in there.stderr
    folder = tmp_path / "lora"  # as a run leaves it, among other names
    folder.mkdir()
    save_file(
        {f"transformer.{LAYER}.{n}": t.contiguous() for n, t in zip(names, (down, up))}, folder / "mine.safetensors"
    )
    merged = run(app, ["quantize", "tiny", "-o", str(tmp_path / "of-folder"), "--lora", f"{folder}=0.5", "--no-check"])
    assert merged.exit_code == 0, merged.output
    name = "diffusion_pytorch_model.safetensors"
    assert all(
        torch.equal(a, b) for a, b in zip(*(load_file(f / name).values() for f in (out, tmp_path / "of-folder")))
    )
    absent = run(app, ["quantize", "tiny", "-o", str(tmp_path / "no"), "--lora", str(tmp_path / "nope.safetensors")])
    assert absent.exit_code == 2 and "there is no LoRA file" in absent.stderr and "loading torch" not in absent.stderr
    again = run(app, ["quantize", str(out), "-o", str(tmp_path / "again")])
    assert again.exit_code == 2 and "is quantised already" in again.stderr
    assert run(app, ["quantize", "tiny", "-o", str(tmp_path / "said"), "--no-check"]).stdout.endswith(
        f"--transformer {tmp_path}/said/diffusion_pytorch_model.safetensors --precision int8\n"
    )
    float8 = run(app, ["quantize", "tiny", "-o", str(tmp_path / "fp8"), "--precision", "fp8"])
    assert "60 layers in float8, errors of weights up to 0.02" in " ".join(float8.stdout.split()), float8.output
    assert f"{tmp_path}/fp8: comparing velocities with those of tiny\n" in float8.stderr
    assert float8.stdout.count("velocity at sigma") == 4 and float8.stdout.endswith("pytorch_model.safetensors\n")
    for words, text in (
        (["quantize", "tiny", "--out", str(out / "x"), "--precision", "int2"], "--precision must be int8"),
        (["quantize", "tniy", "--out", str(out / "x")], "did you mean tiny"),
        (["quantize", "tiny", "--out", str(out / "x"), "--no-check", "--pictures", "3"], "--pictures has no effect"),
    ):
        result = run(app, words)
        assert result.exit_code == 2 and text in result.output.replace("\n", " "), result.output


def test_the_command_without_modulation_weights(tmp_path):
    run, out = CliRunner().invoke, tmp_path / "out"
    words = ["quantize", "tiny", "-o", str(out), "--drop-modulation"]
    result = run(app, [*words, "--steps", "2", "--size", "64x64", "--size", "128x64"])
    assert result.exit_code == 0, result.output
    assert "without modulation weights, for 2 steps of 64x64, 128x64\n" in result.stdout
    assert result.stdout.count("velocity at sigma") == 4
    assert result.stdout.endswith("--precision int8 --steps 2 --size 64x64\n")
    file = out / "diffusion_pytorch_model.safetensors"
    assert json.loads(read_metadata(file)[METADATA])["modulation"] == "2 steps of 64x64, 128x64"
    draw = ["generate", "a red circle", "--model", "tiny", "--transformer", str(file), "--precision", "int8", "-o"]
    call = ["--size", "64x64", "--seed", "0", "--cfg", "1"]
    result = run(app, [*draw, str(tmp_path / "a.png"), *call, "--steps", "2"])
    assert result.exit_code == 0 and (tmp_path / "a.png").exists(), result.output
    result = run(app, [*draw, str(tmp_path / "b.png"), *call, "--steps", "3"])
    assert result.exit_code != 0 and not (tmp_path / "b.png").exists()
    assert "its vectors are for 2 steps of 64x64, 128x64, not for 3 steps of 64x64: " in result.stderr.replace(
        "\n", " "
    )
    shown = run(app, ["inspect", str(file), "--json"])
    [part] = json.loads(shown.stdout)["parts"]
    assert part["runs_in"] == "int8 by --precision int8, else bfloat16 (decoded)", shown.output
    assert [*part["bf16_bytes_of_groups"]] == ["modulation vectors", "text stream", "image stream", "rest"]
    # Work that was stopped before its report goes on with the file only if that is the same.
    (out / "quantization.json").unlink()
    result = run(app, [*words, "--lightning", "4", "--no-check"])
    assert result.exit_code == 0 and "for 4 steps of any size with Lightning\n" in result.stdout, result.output
    assert result.stdout.endswith("--precision int8 --lightning 4\n")
    default = run(app, ["quantize", "tiny", "-o", str(tmp_path / "usual"), "--drop-modulation", "--no-check", "--json"])
    assert json.loads(default.stdout)["modulation"] == "20 steps of 128x128"
    again = run(app, ["quantize", str(out), "-o", str(tmp_path / "again")])
    assert again.exit_code == 2 and "is quantised already" in again.stderr
    float8 = run(app, [*words[:3], str(tmp_path / "fp8"), "--drop-modulation", "--precision", "fp8", "--no-check"])
    assert float8.stdout.endswith("pytorch_model.safetensors --dtype bfloat16\n")  # which a CPU does not take by itself


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--steps", "4"], "--steps has no effect without --drop-modulation"),
        (["--size", "64x64"], "--size has no effect without --drop-modulation"),
        (["--lightning", "4"], "--lightning has no effect without --drop-modulation"),
        (["--drop-modulation", "--lightning", "5"], "--lightning must be 4 or 8, got 5"),
        (["--drop-modulation", "--size", "large"], "--size must be WIDTHxHEIGHT"),
        (["--drop-modulation", "--size", "8x64"], "--size must be at least 16x16, got 8x64"),
        (["--drop-modulation", "--size", "100x64"], "--size must be multiples of 16, as pictures are, got 100x64"),
        (["--drop-modulation", "--pictures", "2"], "--pictures draws by a schedule of its own"),
    ],
)
def test_schedules_that_are_refused(tmp_path, words, sentence):
    result = CliRunner().invoke(app, ["quantize", "tiny", "-o", str(tmp_path / "out"), *words])
    assert result.exit_code == 2 and sentence in result.stderr.replace("\n", " "), result.output


def test_a_transformer_alone_has_no_schedule(tmp_path):
    words = ["quantize", str(SHIPPED / "transformer"), "-o", str(tmp_path / "out"), "--drop-modulation"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "MODEL is a transformer alone" in result.stderr.replace("\n", " ")
