"""What a model folder holds and what fits, against the models themselves and damaged folders."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, errors
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from qwen_image_fast import inspect_model as im
from qwen_image_fast.cli import app
from qwen_image_fast.models.modulation import modulation_layers
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.tensor_files import Entry
from qwen_image_fast.weights.formats import Opened


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def part(model, name):
    return next(p for p in model.parts if p.name == name)


def run(*args):
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def test_numbers_are_those_of_the_models(tiny_folder):
    model = im.inspect_model(tiny_folder)
    assert model.pipeline == "QwenImagePipeline" and not model.problems
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")
    vae = AutoencoderKLQwenImage.from_pretrained(tiny_folder, subfolder="vae")
    for name, real in (("transformer", transformer), ("vae", vae)):
        found = part(model, name)
        assert found.class_name == type(real).__name__
        assert found.parameters == real.num_parameters()
        assert found.disk == {"float32": 4 * real.num_parameters()} and found.bf16 == 2 * real.num_parameters()
    modulation = sum(p.numel() for layer in modulation_layers(transformer).values() for p in layer.parameters())
    groups = part(model, "transformer").groups
    assert groups[im.MODULATION] == 2 * modulation
    assert sum(groups.values()) == part(model, "transformer").bf16
    block = transformer.transformer_blocks[0]
    img = [*block.img_mlp.parameters(), *block.attn.to_q.parameters(), *block.attn.to_out.parameters()]
    assert groups["image stream"] > 2 * 5 * sum(p.numel() for p in img)
    assert groups["rest"] == 2 * sum(p.numel() for p in transformer.time_text_embed.parameters())
    assert part(model, "text_encoder").groups[im.VISION] > 0
    assert part(model, "tokenizer").parameters == 0


def test_dtypes_on_disk(folder):
    model = AutoencoderKLQwenImage.from_pretrained(folder, subfolder="vae")
    state = model.to(torch.bfloat16)
    state.encoder.conv_in.float()
    state.save_pretrained(folder / "vae")
    wide = sum(p.numel() for p in model.encoder.conv_in.parameters())
    found = part(im.inspect_model(folder), "vae")
    assert found.disk == {"bfloat16": 2 * (found.parameters - wide), "float32": 4 * wide}


def test_one_component(tiny_folder):
    model = im.inspect_model(tiny_folder / "transformer")
    assert model.pipeline is None and [p.class_name for p in model.parts] == ["QwenImageTransformer2DModel"]
    assert model.parts[0].parameters == part(im.inspect_model(tiny_folder), "transformer").parameters


def test_the_released_sizes():
    """20.4 B parameters, of which 6.8 B are modulation; the arithmetic of what fits by hand."""
    with torch.device("meta"):
        state = QwenImageTransformer2DModel(num_layers=60).state_dict()
    transformer = im.Part("transformer", "QwenImageTransformer2DModel")
    entries = {name: Entry(Path("x"), torch.bfloat16, tuple(t.shape), 0) for name, t in state.items()}
    im._count(transformer, Opened(entries))
    assert transformer.parameters == 20_430_401_088 and transformer.bf16 == 2 * transformer.parameters
    assert 13.6e9 < transformer.groups[im.MODULATION] < 13.7e9
    groups = {im.HEAD: 1_090_000_000, im.VISION: 1_350_000_000, "language model": 14_140_000_000}
    encoder = im.Part("text_encoder", "Qwen2_5_VLForConditionalGeneration", parameters=8_290_000_000, groups=groups)
    encoder.bf16 = sum(groups.values())
    model = im.Model("x", "QwenImagePipeline", [transformer, encoder, im.Part("tokenizer", "Qwen2Tokenizer")])
    needs = model.needs(margin_gb=3)
    expected = {"all": 40.86 + 14.14 + 3, "all_freed": 27.23 + 14.14 + 3, "one": 40.86 + 3, "one_freed": 27.23 + 3}
    assert needs == pytest.approx(expected, abs=0.02)
    fits = im.as_json(model, 3)["fits_gpu_gb"]
    assert [size for size, ways in fits.items() if ways["all"]] == ["80", "141"]
    assert [size for size, ways in fits.items() if ways["all_freed"]] == ["48", "80", "141"]
    edit = im.Model("x", "QwenImageEditPlusPipeline", model.parts)
    assert edit.needs(3)["all"] == pytest.approx(needs["all"] + 1.35)


def test_command(tiny_folder):
    result = run(tiny_folder)
    assert result.exit_code == 0, result.output
    fits = "Fits, in bf16, a GPU of 8 GB and more: 3.0 GB with all parts at once"
    for text in ("modulation", "6,875,200", fits, "not a measurement", "num_layers 5"):
        assert text in result.stdout
    assert "What fits" in run(tiny_folder, "--margin", 10).stdout and "141 GB" not in result.stdout
    report = json.loads(run(tiny_folder, "--json", "--margin", 10).stdout)
    assert report["margin_gb"] == 10 and report["fits_gpu_gb"]["8"]["all"] is False
    assert report["fits_gpu_gb"]["12"]["all"] is True
    assert next(p for p in report["parts"] if p["name"] == "vae")["config"]["base_dim"] == 8


def truncate(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder):
    model = QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="5MB")
    sorted((folder / "transformer").glob("*-of-*.safetensors"))[1].unlink()


def wrong_shard(folder):
    model = QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="5MB")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["transformer_blocks.9.extra"] = next(iter(value["weight_map"].values()))
    index.write_text(json.dumps(value))


def two_shards_with_the_same(folder):
    model = QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="5MB")
    first, second, *_ = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    shutil.copy(first, second)


def break_config(folder):
    (folder / "vae" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncate, "vae: .*is truncated or not safetensors"),
        (lose_shard, "transformer: .*lacks 1 of the [0-9]+ shards"),
        (wrong_shard, "transformer: the shards lack 1 tensors .*transformer_blocks.9.extra"),
        (two_shards_with_the_same, "transformer: .* is both in .* and in .*; remove one"),
        (break_config, "vae: .*config.json is not valid json"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler: model_index.json names it, but there is no"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae: .*has no safetensors"),
    ],
)
def test_damage_is_named_and_the_rest_is_shown(folder, damage, text):
    damage(folder)
    result = run(folder)
    assert result.exit_code == 1
    assert len(errors_of(result)) == 1
    assert re.search(text, errors_of(result)[0])
    assert "damaged" in result.stdout and "Qwen2Tokenizer" in result.stdout and "What fits" not in result.stdout
    assert "Traceback" not in result.output
    assert json.loads(run(folder, "--json").stdout)["problems"]


def errors_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_nothing_to_read(tmp_path):
    (tmp_path / "file.txt").touch()
    for path, text in (
        ("none/of/this", "there is no folder"),
        ("file.txt", "not safetensors"),
        ("", "neither model_index"),
    ):
        result = run(tmp_path / path)
        assert result.exit_code == 2 and text in result.stderr and len(errors_of(result)) == 1, result.output


def remote_header(tiny_folder):
    """What the hub's API gives, from the files of a folder."""

    class Info:
        def __init__(self, dtype, shape):
            self.dtype, self.shape = dtype, shape

    def parse(self, repo_id, filename):
        assert repo_id == "owner/tiny"
        with safe_open(tiny_folder / filename, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return type("Metadata", (), {"tensors": {n: Info(s.get_dtype(), s.get_shape()) for n, s in slices.items()}})

    return parse


def test_a_hub_repository_without_its_weights(folder, tiny_folder, monkeypatch):
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    local = im.inspect_model(tiny_folder)
    asked = []
    monkeypatch.setattr(im, "resolve_folder", lambda name, allow_patterns: asked.append(allow_patterns) or folder)
    monkeypatch.setattr(HfApi, "parse_safetensors_file_metadata", remote_header(tiny_folder))
    model = im.inspect_model("owner/tiny")
    assert asked == [["*.json"]] and not model.problems and model.parts == local.parts


def test_a_hub_that_does_not_answer(folder, monkeypatch):
    def refuse(*args):
        raise errors.OfflineModeIsEnabled("offline")

    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(im, "resolve_folder", lambda name, allow_patterns: folder)
    monkeypatch.setattr(HfApi, "parse_safetensors_file_metadata", refuse)
    problems = im.inspect_model("owner/tiny").problems
    assert len(problems) == 1  # the other parts are cached
    assert "vae: the header of vae/diffusion_pytorch_model.safetensors could not be read from the hub" in problems[0]


def test_size_text():
    sizes = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 12_345_678: "12.3 MB", 999_400_000: "999 MB"}
    sizes |= {40_860_802_176: "40.9 GB", 2 * 10**12: "2000 GB"}
    assert {size: im.size_text(size) for size in sizes} == sizes


def test_a_file_of_several_parts(tiny_folder, tmp_path):
    """Formats and bytes of each, and what they become."""
    transformer = QwenImageTransformer2DModel.from_pretrained(tiny_folder, subfolder="transformer").state_dict()
    vae = AutoencoderKLQwenImage.from_pretrained(tiny_folder, subfolder="vae")
    tensors = {f"vae.{name}": tensor.half() for name, tensor in vae.state_dict().items()}
    tensors |= {f"model.diffusion_model.{name}": tensor for name, tensor in transformer.items()}
    name = "model.diffusion_model.transformer_blocks.0.img_mod.1"
    tensors |= {f"{name}.weight": tensors[f"{name}.weight"].to(torch.float8_e4m3fn)}
    tensors |= {
        f"{name}.weight_scale": torch.tensor(1.0),
        "model.diffusion_model.__index_timestep_zero__": torch.zeros(1),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "all.safetensors")
    model = im.inspect_model(tmp_path / "all.safetensors")
    first, second = model.parts
    count = sum(tensor.numel() for tensor in transformer.values())
    eight = transformer["transformer_blocks.0.img_mod.1.weight"].numel()
    assert (first.name, first.parameters, first.bf16) == ("transformer", count, 2 * count)
    assert first.disk == {"float8_e4m3fn scaled": eight + 4, "float32": 4 * (count - eight)}
    assert first.runs == "bfloat16 (decoded)" and first.config == {"zero_cond_t": True}
    assert (second.name, second.disk, second.runs) == ("vae", {"float16": 2 * vae.num_parameters()}, "float16")
    shown = run(tmp_path / "all.safetensors")
    assert shown.exit_code == 0 and "Runs in: transformer bfloat16 (decoded), vae float16" in shown.output
    told = json.loads(run(tmp_path / "all.safetensors", "--json").output)
    assert [part["runs_in"] for part in told["parts"]] == ["bfloat16 (decoded)", "float16"]
