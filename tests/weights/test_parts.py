"""Pipelines with parts from single files; the text encoder under llama.cpp's and ComfyUI's names."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from weights.writers import as_q8_0, float8, from_q8_0, q8_0, write_gguf, write_safetensors

from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from qwen_image_fast.cli import app
from qwen_image_fast.models.text_encoder import load_text_encoder
from qwen_image_fast.pipelines.layered import QwenImageLayeredPipeline
from qwen_image_fast.png_metadata import read_parameters
from qwen_image_fast.weights.formats import parts_in

CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 3, "true_cfg_scale": 1.0, "output_type": "np"}


def picture(pipe):
    return np.stack(pipe("red", **CALL).images)


def scaled(state, prefix=""):
    """ComfyUI's float8 with scales, in the newer form; and what it is read as."""
    tensors, expected = {}, {}
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            q = float8(tensor, scale)
            tensors |= {prefix + name: q, f"{prefix}{name}_scale": scale}
            expected[name] = q.float() * scale
        else:
            tensors[prefix + name] = expected[name] = tensor
    return tensors, expected


@pytest.fixture(scope="module")
def states(tiny_folder):
    """The tensors of each part, as the folder has them."""
    names = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    return {part: load_file(tiny_folder / part / f"{name}.safetensors") for part, name in names.items()}


def folder_of(tiny_folder, path, changed):
    """A copy of the tiny model with other weights in some parts."""
    shutil.copytree(tiny_folder, path)
    for part, state in changed.items():
        (file,) = (path / part).glob("*.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return path


def test_a_picture_is_that_of_the_dequantised_model(tiny_folder, tmp_path, states):
    tensors, expected = scaled(states["transformer"], "model.diffusion_model.")
    path = write_safetensors(tmp_path / "fp8.safetensors", tensors)
    same = folder_of(tiny_folder, tmp_path / "same", {"transformer": expected})
    wanted = picture(QwenImagePipeline.from_pretrained(same))
    type_ = torch.float32
    model = QwenImageTransformer2DModel.from_single_file(path, config=tiny_folder, torch_dtype=type_)
    ways = {
        "one file": QwenImagePipeline.from_single_file(path, config=tiny_folder, torch_dtype=type_),
        "named": QwenImagePipeline.from_pretrained(tiny_folder, transformer=str(path), torch_dtype=type_),
        "ready": QwenImagePipeline.from_pretrained(tiny_folder, transformer=model),
    }
    for way, pipe in ways.items():
        assert np.array_equal(picture(pipe), wanted), way
    assert not np.array_equal(picture(QwenImagePipeline.from_pretrained(tiny_folder)), wanted)
    ways["one file"].save_pretrained(tmp_path / "saved")
    assert np.array_equal(picture(QwenImagePipeline.from_pretrained(tmp_path / "saved")), wanted)


def test_without_a_word_about_the_type(tiny_folder, tmp_path, states):
    """The transformer becomes bfloat16, the rest stays float32, and they work together."""
    path = write_safetensors(tmp_path / "fp8.safetensors", scaled(states["transformer"])[0])
    pipe = QwenImagePipeline.from_single_file(path, config=tiny_folder)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert np.isfinite(picture(pipe)).all()


def test_one_file_with_all_parts(tiny_folder, tmp_path, states):
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae."}
    prefixes["text_encoder"] = "text_encoders.qwen25_7b.transformer."
    tensors, changed = {}, {}
    for part, prefix in prefixes.items():
        more, changed[part] = scaled(states[part], prefix)
        tensors |= more
    path = write_safetensors(tmp_path / "all.safetensors", tensors)
    assert parts_in(path) == ["transformer", "text_encoder", "vae"]
    wanted = picture(QwenImagePipeline.from_pretrained(folder_of(tiny_folder, tmp_path / "same", changed)))
    for part in prefixes:  # nothing of the folder is read but settings
        (file,) = (tiny_folder / part).glob("*.safetensors")
        assert file.is_file()
    settings = folder_of(tiny_folder, tmp_path / "settings", {})
    for file in settings.glob("*/*.safetensors"):
        file.unlink()
    pipe = QwenImagePipeline.from_single_file(path, config=settings, torch_dtype=torch.float32)
    assert np.array_equal(picture(pipe), wanted)


# ---- llama.cpp ----------------------------------------------------------------------------------------------------


def llama_files(folder, state):
    """The text encoder as llama.cpp's converter writes it: the language model and, apart, the vision tower."""
    import gguf

    language = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, 2)
    vision = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 32)
    files, expected = {"text": {}, "mmproj": {}}, {}

    def put(file, name, tensor):
        kept = tensor.ndim < 2 or tensor.shape[-1] % 32
        blocks = None if kept else q8_0(tensor)
        file[name] = tensor if kept else ("Q8_0", blocks, tuple(tensor.shape))
        return tensor if kept else from_q8_0(blocks, tensor.shape)

    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if not name.startswith("visual."):
            expected[name] = put(files["text"], f"{language.get_name(stem)}.{kind}", tensor)
        elif ".qkv." in name:
            stems = [vision.get_name(stem.replace("qkv", which)) for which in "qkv"]
            pieces = [put(files["mmproj"], f"{s}.{kind}", t) for s, t in zip(stems, tensor.chunk(3))]
            expected[name] = torch.cat(pieces)
        elif "patch_embed" in name:
            pieces = [put(files["mmproj"], f"{vision.get_name(stem)}.{kind}", tensor[:, :, 0])]
            pieces.append(put(files["mmproj"], f"{vision.get_name(stem)}.{kind}.1", tensor[:, :, 1]))
            expected[name] = torch.stack(pieces, 2)
        else:
            expected[name] = put(files["mmproj"], f"{vision.get_name(stem)}.{kind}", tensor)
    assert all(re.match(r"(blk\.\d|token_embd|output)", name) for name in files["text"])
    text = write_gguf(folder / "text.gguf", files["text"], {"general.architecture": "qwen2vl"})
    tower = write_gguf(folder / "mmproj.gguf", files["mmproj"], {"general.architecture": "clip"})
    return text, tower, expected


@pytest.mark.parametrize("vision", [False, True])
def test_a_text_encoder_of_llama(tiny_folder, tmp_path, states, vision):
    text, tower, expected = llama_files(tmp_path, states["text_encoder"])
    files = [text, tower] if vision else [text]
    model = load_text_encoder(tiny_folder / "text_encoder", files=files, torch_dtype=torch.float32, vision=vision)
    same = folder_of(tiny_folder, tmp_path / "same", {"text_encoder": expected}) / "text_encoder"
    wanted = load_text_encoder(same, vision=vision)
    state, other = model.state_dict(), wanted.state_dict()
    assert state.keys() == other.keys() and any("visual" in name for name in state) == vision
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_pipeline_that_sees_with_files_of_llama(tmp_path, states):
    from qwen_image_fast.tiny import write_untrained

    write_untrained(tmp_path / "edit", edit=True)
    text, tower, _ = llama_files(tmp_path, states["text_encoder"])
    type_ = {"torch_dtype": torch.float32}
    pipe = QwenImageEditPlusPipeline.from_pretrained(tmp_path / "edit", text_encoder=[text, str(tower)], **type_)
    assert pipe.text_encoder.visual is not None
    pipe.save_pretrained(tmp_path / "saved")
    saved = QwenImageEditPlusPipeline.from_pretrained(tmp_path / "saved").text_encoder.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in pipe.text_encoder.state_dict().items())
    with pytest.raises(ValueError, match=r"text.gguf must hold the vision tower, .* named mmproj: name both"):
        QwenImageEditPlusPipeline.from_pretrained(tmp_path / "edit", text_encoder=text)
    with pytest.raises(TypeError, match="text_encoder must be the part itself for a QwenImageLayeredPipeline"):
        QwenImageLayeredPipeline.from_pretrained(tmp_path / "edit", text_encoder=text)


def test_what_was_not_loaded_is_saved_from_a_file_of_llama(tiny_folder, tmp_path, states):
    text, tower, expected = llama_files(tmp_path, states["text_encoder"])
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, text_encoder=[text, tower], torch_dtype=torch.float32)
    assert pipe.text_encoder.visual is None
    pipe.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "text_encoder" / "model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


# ---- bitsandbytes' folders ----------------------------------------------------------------------------------------


def test_a_folder_that_says_how_it_is_quantised(tiny_folder, tmp_path, states):
    """diffusers writes `quantization_config` into config.json; the files tell the same."""
    tensors, expected = scaled(states["transformer"])
    folder = folder_of(tiny_folder, tmp_path / "folder", {"transformer": tensors})
    config = folder / "transformer" / "config.json"
    settings = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "modelopt"}}
    config.write_text(json.dumps(settings))
    model = QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_what_is_refused(tiny_folder, tmp_path, states):
    path = write_safetensors(tmp_path / "other.safetensors", {"lora_A.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"other.safetensors holds lora_A.weight: .* no part of Qwen-Image"):
        QwenImagePipeline.from_single_file(path, config=tiny_folder)
    with pytest.raises(TypeError, match="config must name a pipeline's folder or hub model"):
        QwenImagePipeline.from_single_file(path)
    with pytest.raises(ValueError, match="these are not the weights of Qwen2.5-VL: lora_A.weight"):
        QwenImagePipeline.from_pretrained(tiny_folder, text_encoder=path)
    with pytest.raises(TypeError, match="tokenizer must be the part itself for a QwenImagePipeline, got "):
        QwenImagePipeline.from_pretrained(tiny_folder, tokenizer=path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*othr.safetensors; did you mean"):
        QwenImagePipeline.from_pretrained(tiny_folder, transformer=tmp_path / "othr.safetensors")
    text = {"general.architecture": "qwen2vl", "general.name": "x"}
    path = write_gguf(tmp_path / "a.gguf", {"blk.0.attn_q.weight": torch.zeros(2, 2)}, text)
    assert parts_in(path) == ["text_encoder"]
    with pytest.raises(ValueError, match="of the architecture qwen2vl, not of a Qwen-Image transformer"):
        QwenImagePipeline.from_pretrained(tiny_folder, transformer=path)


@pytest.mark.parametrize("given,left", [({"transformer": "file"}, {"vae", "text_encoder"}), ({}, None)])
def test_weights_that_are_given_are_not_downloaded(tiny_folder, tmp_path, states, monkeypatch, given, left):
    asked = {}

    def download(repository, allow_patterns, **hub):
        asked.update(patterns=allow_patterns)
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    path = write_safetensors(tmp_path / "model.safetensors", states["transformer"])
    QwenImagePipeline.from_pretrained("owner/model", **dict.fromkeys(given, path))
    folders = {p.split("/")[0] for p in asked["patterns"] if "/*.safetensors" in p}
    assert "*.json" in asked["patterns"]
    if left is None:
        assert "*.safetensors" in asked["patterns"]
    else:
        assert "*.safetensors" not in asked["patterns"] and left <= folders and "transformer" not in folders


# ---- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line(tiny_folder, tmp_path, states, monkeypatch):
    """A picture with another transformer and VAE is that of the pipeline, and is repeated from what the PNG says."""
    monkeypatch.chdir(tmp_path)
    files = {"transformer": "q8.gguf", "vae": "vae.safetensors"}
    write_gguf(
        tmp_path / files["transformer"], as_q8_0(states["transformer"])[0], {"general.architecture": "qwen_image"}
    )
    write_safetensors(tmp_path / files["vae"], states["vae"])
    call = ["red", "--model", tiny_folder, "--size", "32x32", "--steps", 2, "--seed", 3, "--cfg", 1, "--device", "cpu"]
    options = ["--transformer", files["transformer"], "--vae", files["vae"]]

    def generate(*args):
        return CliRunner().invoke(app, ["generate", *map(str, args), "--quiet"])

    made = generate(*call, *options, "-o", "a.png")
    assert made.exit_code == 0, made.output
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, **files, torch_dtype=torch.float32)
    image = pipe("red", **{**CALL, "output_type": "pil"}).images[0]
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(image))
    found = read_parameters("a.png")
    assert found["transformer"] == str(tmp_path / "q8.gguf") and "text_encoder" not in found
    assert generate("--from-image", "a.png", "-o", "b.png").exit_code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    for wrong, code, text in (
        (["--transformer", "q9.gguf"], 2, "there is no file q9.gguf; did you mean q8.gguf?"),
        (["--transformer", files["vae"]], 2, "vae.safetensors: these are not the weights of a Qwen-Image transformer"),
        (["--text-encoder", "."], 2, "is a folder; name one of its files"),
    ):
        refused = generate(*call, *wrong)
        assert refused.exit_code == code and text in " ".join(refused.stderr.split()), refused.output
        assert "Traceback" not in refused.stderr
