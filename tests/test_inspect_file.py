"""What `inspect` says of files that are no part of a model: adapters of every kind and style, and anything else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tests.pipelines.loras import MODULATION, STYLES, pairs, state
from tests.weights.writers import write_gguf
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.folders import SHIPPED, read_json
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

MODEL = SimpleNamespace(
    transformer=QwenImageTransformer2DModel.empty(read_json(SHIPPED / "transformer" / "config.json"))
)
TINY = ["tiny, the model of the package"]


def inspected(path, *args):
    """The object, and what is shown."""
    results = [CliRunner().invoke(app, ["inspect", str(path), *args, *more]) for more in (["--json"], [])]
    assert [r.exit_code for r in results] == [0, 0], results[1].output
    return json.loads(results[0].stdout), results[1].stdout


@pytest.mark.parametrize("style", STYLES)
def test_loras_of_every_style(style, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(state(pairs(MODEL, MODULATION, rank=4), style, alpha=2.0), file)
    found, shown = inspected(file)
    assert (found["is"], found["layers"], found["rank"], found["fits"]) == ("LoRA", len(MODULATION), [4], TINY)
    assert found["alpha"] == ([] if STYLES[style][2] is None else [2.0])
    assert style.split(",")[0].removeprefix("old ").split()[0] in found["keys"].lower() or style == "comfy, model"
    assert "LoRA" in shown and TINY[0] in shown and "float32" in shown


def test_a_folder_as_peft_writes_it(tmp_path):
    """Scales are in the file beside it."""
    save_file(state(pairs(MODEL, rank=3), "peft"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6, "alpha_pattern": {"to_q": 12}}))
    found, _ = inspected(tmp_path)
    assert (found["keys"], found["rank"], found["alpha"]) == ("PEFT", [3], [6, 12])
    assert found["file"] == str(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"dora_scale": (192, 1), "lora_down.weight": (2, 192), "lora_up.weight": (192, 2)}, "DoRA"),
        ({"hada_w1_a": (192, 2), "hada_w1_b": (2, 192), "hada_w2_a": (192, 2), "hada_w2_b": (2, 192)}, "LoHa"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (48, 2), "lokr_w2_b": (2, 48)}, "LoKr"),
        ({"diff": (192, 192), "diff_b": (192,)}, "differences of weights"),
    ],
)
def test_other_adapters(tensors, kind, tmp_path):
    layer = "diffusion_model.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.{k}": torch.ones(shape) for k, shape in tensors.items()}, tmp_path / "x.safetensors")
    found, _ = inspected(tmp_path / "x.safetensors")
    assert (found["is"], found["fits"], found["keys"]) == (kind, TINY, "ComfyUI")


def test_a_lora_of_another_model_and_of_the_text_encoder(tmp_path):
    """Why it does not fit is said for each model."""
    down, up = (f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight" for x in "AB")
    text = {f"text_encoder.layers.0.self_attn.q_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file({down: torch.ones(8, 64), up: torch.ones(64, 8), **text}, tmp_path / "x.safetensors")
    found, shown = inspected(tmp_path / "x.safetensors")
    assert found["fits"] == [] and found["text encoder"] == "2 tensors"
    assert all("must be [rank, " in problem for problem in found["problems"].values()) and len(found["problems"]) == 2
    assert "[rank, 3072] and [3072, rank], got [8, 64] and [64, 8]: the file is for another model" in shown
    save_file({"transformer." + down: torch.ones(8, 3072), "transformer." + up: torch.ones(3072, 8)},
              tmp_path / "x.safetensors")  # fmt: skip
    assert inspected(tmp_path / "x.safetensors")[0]["fits"] == ["the released Qwen-Image transformers"]


def test_any_other_file(tmp_path):
    tensors = {"model.embed": torch.zeros(3, 4), "model.head": torch.zeros(5, dtype=torch.int8)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"maker": "someone"})
    write_gguf(tmp_path / "x.gguf", {"blk.0.attn": torch.zeros(2, 32)}, {"general.architecture": "llama"})
    found, shown = inspected(tmp_path / "x.safetensors")
    assert (found["is"], found["tensors"], found["values"]) == ("a safetensors file", 2, {"float32": 12, "int8": 5})
    assert found["metadata"] == {"maker": "someone"} and "maker: someone" in shown and "model.embed" in shown
    found, shown = inspected(tmp_path / "x.gguf")
    assert found["is"] == "a GGUF of the architecture llama" and found["values"] == {"float32": 64}
    assert "of             no part of Qwen-Image, and no LoRA" in shown


def test_parts_of_a_model_are_still_described_as_such(tmp_path):
    shutil.copy(SHIPPED / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "x.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "x.safetensors")])
    assert result.exit_code == 0 and "AutoencoderKLQwenImage" in result.stdout
    (tmp_path / "y.safetensors").write_bytes(b"\x89PNG and more")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "y.safetensors")])
    assert result.exit_code == 2 and "y.safetensors is a PNG picture, not a safetensors file" in result.stderr
