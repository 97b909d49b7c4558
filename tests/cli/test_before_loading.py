"""What is known to be wrong before a model is loaded is said before one is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_harness import refused
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast.cli import app
from qwen_image_fast.models import base, text_encoder
from qwen_image_fast.tiny import tiny_configs, write_untrained

KEY = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An editing model and ControlNets, one of them for a wider transformer."""
    root = tmp_path_factory.mktemp("models")
    write_untrained(root / "edit", edit=True)
    config = {k: v for k, v in tiny_configs()["transformer"].items() if k != "guidance_embeds"} | {"num_layers": 1}
    torch.manual_seed(0)
    for name, own in (("union", {}), ("inpaint", {"extra_condition_channels": 4}), ("wide", {"in_channels": 32})):
        qwen_image_fast.QwenImageControlNetModel(**{**config, **own}).save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    """No weight of any part is read."""
    for module in (base, text_encoder):
        monkeypatch.setattr(module, "load_state_into", lambda *args, **kwargs: pytest.fail("weights were read"))


@pytest.fixture
def files(in_tmp, folders):
    Path("home").mkdir()
    there = {path: folders / "edit" / path / "diffusion_pytorch_model.safetensors" for path in ("vae", "transformer")}
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save("home/a.png")
    for name, value in (("black", 0), ("grey", 100)):
        Image.new("L", (64, 48), value).save(f"home/{name}.png")
    speck = Image.new("L", (64, 48))
    speck.putpixel((3, 3), 255)
    speck.save("home/speck.png")
    save_file({KEY.format("A"): torch.ones(2, 64), KEY.format("B"): torch.ones(192, 2)}, "home/other.safetensors")
    Path("home/run/loras").mkdir(parents=True)
    for step in (4, 12):
        Path(f"home/run/loras/step-{step:08}.safetensors").touch()
    nan = torch.full((192, 2), torch.nan)
    save_file({KEY.format("A"): torch.ones(2, 192), KEY.format("B"): nan}, "home/nan.safetensors")
    text = {k.replace("transformer.", "text_encoder.model."): v for k, v in ((KEY.format("A"), torch.ones(2, 64)),)}
    save_file(text, "home/text.safetensors")
    Path("home/cut.safetensors").write_bytes(there["vae"].read_bytes()[:-8])
    Path("home/two").mkdir()
    for name in "ab":
        save_file({KEY.format("A"): torch.ones(2, 64)}, f"home/two/{name}.safetensors")
    Path("home/page.safetensors").write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    return {"vae": there["vae"], "transformer": there["transformer"]}


PICTURE = "home/a.png"
MASKED = {
    "generate": ("x", "--image", PICTURE),
    "edit": ("x", "--image", PICTURE),
    "controlnet": ("x", "--control", PICTURE, "--net", "{root}/inpaint"),
}
CASES = [
    *(
        (command, (*args, "--mask", f"home/{mask}.png"), text)
        for command, args in MASKED.items()
        for mask, text in (
            ("black", "--mask must be white where the picture may change"), ("grey", "got 100 at the brightest place"),
            ("speck", "--mask must be white at a latent pixel"),
        )
    ),
    *(
        (command, (*args, *wrong), text)
        for command, args in (
            ("generate", ("x",)), ("edit", ("x", "--image", PICTURE)),
            ("controlnet", ("x", "--control", PICTURE, "--net", "{root}/union")),
        )
        for wrong, text in (
            (("--lora", PICTURE), "a.png is a PNG picture, not a safetensors file"),
            (("--lora", "home/page.safetensors"), "is a web page, not the file itself"),
            (("--lora", "home/run"), "holds no LoRA: it has no safetensors file; the newest of that run is"),
            (("--lora", "home/run/model"), "there is no LoRA file or folder home/run/model; the newest of that run is "
             "home/run/loras/step-00000012.safetensors"),
            (("--lora", f"{PICTURE}=abc"), "a.png must be a number, got abc"),
            (("--transformer", "{root}/edit/vae/config.json"), "holds no weights: name a .safetensors or .gguf file"),
            (("--lora", "{vae}"), "no LoRA: it holds the weights of the Qwen-Image VAE, which vae= (--vae) takes"),
            (("--lora", "{transformer}"), "a Qwen-Image transformer, which transformer= (--transformer) takes"),
            (("--lora", "home/two"), "home/two/a.safetensors or by weight_name: a.safetensors, b.safetensors"),
            (("--lora", "home/other.safetensors"), "other.safetensors: transformer_blocks.0.attn.to_q must be [rank"),
            (("--lora", "home/nan.safetensors"), "nan.safetensors: transformer_blocks.0.attn.to_q must hold finite"),
            (("--lora", "home/text.safetensors"), "text.safetensors: keys must be LoRA pairs of layers of Qwen2_5_VL"),
            (("--vae", "{transformer}"), "of the Qwen-Image VAE: those of a Qwen-Image transformer, which tran"),
            (("--vae", PICTURE), "a.png is a PNG picture"),
            (("--vae", "home/cut.safetensors"), "bytes) is truncated or not safetensors"),
            (("--transformer", "{vae}"), "these are not the weights of a Qwen-Image transformer"),
            (("--text-encoder", "{vae}"), "not the weights of Qwen2.5-VL: those of the Qwen-Image VAE, which"),
        )
    ),
    ("controlnet", ("x", "--control", PICTURE, "--net", "{root}/edit"), "edit holds a whole QwenImageEditPlusPipeline"),
    ("controlnet", ("x", "--control", PICTURE, "--net", "tiny"), "--net must be the folder of a ControlNet alone"),
    ("controlnet", ("x", "--control", PICTURE, "--net", "{root}/edit/vae"), "configuration of a AutoencoderKLQwenIm"),
    ("controlnet", ("x", "--control", PICTURE, "--net", "{root}/wide"), "controlnet must be of the transformer's fam"),
    ("controlnet", ("x", "--control", PICTURE, "--net", "{root}/inpaint"), "an inpainting ControlNet, which needs a"),
    (
        "controlnet", ("x", "--control", PICTURE, "--mask", "home/a.png", "--net", "{root}/union"),
        "a union ControlNet, which takes no mask",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("command", "args", "text"), CASES, ids=[f"{c[0]} {c[1][-1]}" for c in CASES])
def test_inputs_that_cannot_be(command, args, text, folders, files):
    args = [str(arg).format(root=folders, **files) for arg in args]
    refused(CliRunner().invoke(app, [command, *args, "--model", str(folders / "edit"), "--steps", "2"]), 2, text)


@pytest.mark.parametrize(
    ("part", "damage", "text"),
    [
        ("vae", lambda f: f.write_bytes(f.read_bytes()[:-8]), "truncated"),
        ("transformer", Path.unlink, "has no diffusion_pytorch_model.safetensors"),
        ("text_encoder", lambda f: f.write_bytes(b"not this"), "is a text, not a safetensors file"),
    ],
)
def test_a_folder_with_a_damaged_part(part, damage, text, in_tmp):
    write_untrained(in_tmp / "model")
    damage(next((in_tmp / "model" / part).glob("*.safetensors")))
    refused(CliRunner().invoke(app, ["generate", "x", "--model", "model"]), 1, text)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"transformer": "{transformer}", "vae": "home/none.safetensors"}, "there is no file home/none.safetensors"),
        ({"transformer": "{transformer}", "vae": "{transformer}"}, "not the weights of the Qwen-Image VAE"),
        ({"transformer": "{transformer}", "text_encoder": "{vae}"}, "not the weights of Qwen2.5-VL"),
    ],
)
def test_files_in_python(parts, text, folders, files):
    given = {name: file.format(**files) for name, file in parts.items()}
    with pytest.raises((FileNotFoundError, ValueError), match=text):
        qwen_image_fast.QwenImagePipeline.from_pretrained(folders / "edit", **given)
