"""What a pipeline reads from a folder and writes into one: types, variants, parts that are None, keywords."""

import json
import logging
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_image_fast import (
    AutoencoderKLQwenImage,
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from qwen_image_fast.folders import SHIPPED

CALL = {"prompt": "a red cat", "height": 32, "width": 32, "num_inference_steps": 2, "seed": 0, "progress": False}
BF16, F64 = torch.bfloat16, torch.float64


def latents(pipe, **change):
    return pipe(**{**CALL, "output_type": "latent", **change}).images


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"torch_dtype": {"vae": F64, "default": BF16}}, {"vae": F64, "transformer": BF16, "text_encoder": BF16}),
        ({"dtype": {"transformer": BF16}}, {"vae": None, "transformer": BF16, "text_encoder": None}),
        ({"dtype": BF16}, {"vae": BF16, "transformer": BF16, "text_encoder": BF16}),
        ({"torch_dtype": BF16, "dtype": BF16, "device_map": "cpu"}, {"vae": BF16}),
        ({"torch_dtype": "auto", "use_safetensors": True, "low_cpu_mem_usage": False}, {"vae": None}),
    ],
    ids=str,
)
def test_types(tiny_folder, pipe, given, expected):
    parts = QwenImagePipeline.from_pretrained(tiny_folder, **given).components
    for name, dtype in expected.items():
        assert parts[name].dtype == (dtype or pipe.components[name].dtype)


REFUSED = {
    "dtype must equal torch_dtype where both are given": (ValueError, {"torch_dtype": BF16, "dtype": F64}),
    "torch_dtype: vea is not an argument; did you mean vae": (TypeError, {"torch_dtype": {"vea": BF16}}),
    "dtype must be a floating-point torch dtype": (ValueError, {"dtype": {"vae": "bfloat16"}}),
    "use_safetensors must not be False: pickled weights are never read": (ValueError, {"use_safetensors": False}),
    "device_map must be one device for all weights, got 'balanced'": (ValueError, {"device_map": "balanced"}),
    "max_memory has no use here: memory_limit= says what the device may hold": (TypeError, {"max_memory": {0: "4GB"}}),
    "offload_folder has no use here": (TypeError, {"offload_folder": "x"}),
    "quantization_config has no use here: weights are read as floating point": (TypeError, {"quantization_config": 1}),
    "from_pretrained: torch_type is not an argument; did you mean torch_dtype": (TypeError, {"torch_type": BF16}),
}


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("cls", [QwenImagePipeline, QwenImageTransformer2DModel])
def test_what_is_refused_is_said(tiny_folder, cls, text):
    error, given = REFUSED[text]
    if cls is QwenImageTransformer2DModel and isinstance(given.get("torch_dtype", given.get("dtype")), dict):
        text = "dtype must be a floating-point torch dtype or None, got {"
        error = ValueError
    with pytest.raises(error, match=text):
        cls.from_pretrained(tiny_folder, **given, **({} if cls is QwenImagePipeline else {"subfolder": "transformer"}))


def test_parts_may_be_none(tiny_folder, pipe, tmp_path):
    expected = latents(pipe)
    encoder = QwenImagePipeline.from_pretrained(tiny_folder, transformer=None, vae=None, scheduler=None).to("cpu")
    embeds, mask = encoder.encode_prompt("a red cat")
    bare = QwenImagePipeline.from_pretrained(tiny_folder, text_encoder=None, tokenizer=None, vae=None).to("cpu")
    bare.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == index["tokenizer"] == [None, None] and not (tmp_path / "vae").exists()
    for own in (bare, QwenImagePipeline.from_pretrained(tmp_path)):
        got = latents(own, prompt=None, prompt_embeds=embeds, prompt_embeds_mask=mask)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert own.vae is own.text_encoder is None and own.vae_scale_factor == 8
    for change, text in (
        ({"output_type": "latent"}, "prompt must be given as prompt_embeds: this .* was made with text_encoder=None"),
        ({"prompt": None, "prompt_embeds": embeds}, "output_type must be 'latent', got 'pil': .* made with vae=None"),
    ):
        with pytest.raises(ValueError, match=text):
            bare(**{**CALL, **change})
    with pytest.raises(ValueError, match="nothing can be sampled: this .* was made with transformer=None"):
        encoder(**CALL)
    with pytest.raises(ValueError, match="prompt cannot be encoded: this .* was made with text_encoder=None"):
        bare.encode_prompt("x")
    with pytest.raises(ValueError, match="must have a model to have a device"):
        _ = QwenImagePipeline(None, None, None, None, None).device


@pytest.mark.parametrize("cls", [QwenImageImg2ImgPipeline, QwenImageEditPlusPipeline, QwenImageControlNetPipeline])
def test_pictures_need_a_vae(edit_folder, cls):
    given = {"controlnet": None} if cls is QwenImageControlNetPipeline else {}
    pipe = cls.from_pretrained(edit_folder, vae=None, **given)
    name = "control_image" if given else "image"
    with pytest.raises(ValueError, match="no picture can be encoded: this .* was made with vae=None"):
        pipe(**CALL, **{name: torch.zeros(3, 32, 32)}, output_type="latent")
    if given:
        with pytest.raises(ValueError, match="was made with controlnet=None"):
            cls.from_pretrained(edit_folder, **given)(**CALL, control_image=torch.zeros(3, 32, 32))


def test_parts_of_diffusers(tiny_folder, pipe):
    """A VAE and a scheduler do; a transformer is named."""
    vae = diffusers.AutoencoderKLQwenImage.from_pretrained(tiny_folder, subfolder="vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_folder, subfolder="scheduler")
    mixed = QwenImagePipeline.from_pretrained(tiny_folder, vae=vae, scheduler=scheduler)
    expected = pipe(**CALL, output_type="np").images
    assert abs(mixed(**CALL, output_type="np").images - expected).max() < 1e-4
    with pytest.raises(TypeError, match="from_pretrained: subfoldr is not an argument; did you mean subfolder"):
        type(pipe.scheduler).from_pretrained(tiny_folder, subfoldr="scheduler")
    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")
    with pytest.raises(TypeError, match="transformer must be this package's .*, got diffusers' own"):
        QwenImagePipeline.from_pretrained(tiny_folder, transformer=theirs)


@pytest.mark.parametrize("size", [None, "100KB"])
def test_variants_of_all_parts(edit_folder, tmp_path, size, caplog):
    """The text encoder's too, with the vision tower, which text to image does not load."""
    pipe = QwenImagePipeline.from_pretrained(edit_folder, torch_dtype=torch.float16)
    expected = latents(pipe)
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    names = [p.name for name in ("transformer", "vae", "text_encoder") for p in (tmp_path / name).glob("*.safetensors")]
    assert len(names) >= (3 if size is None else 6) and all(".fp16" in name for name in names)
    again = QwenImagePipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(latents(again), expected) and again.text_encoder.dtype == torch.float16
    theirs = diffusers.QwenImagePipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    vision = QwenImageEditPipeline.from_pretrained(edit_folder).text_encoder.visual.half().state_dict()
    assert all(torch.equal(v, vision[k]) for k, v in theirs.text_encoder.model.visual.state_dict().items())

    with pytest.raises(ValueError, match="files of the `variant=bf16`, but no part of .* has any, such as"):
        QwenImagePipeline.from_pretrained(tmp_path, variant="bf16")
    pipe.vae.save_pretrained(tmp_path / "vae")
    for file in (tmp_path / "vae").glob("*.fp16*"):
        file.unlink()
    with caplog.at_level(logging.INFO, "qwen_image_fast"):
        QwenImagePipeline.from_pretrained(tmp_path, variant="fp16")
    assert "variant fp16: read without it, for lack of such files: vae" in caplog.text
    assert all(f"loaded {name} from {tmp_path / name}" in caplog.text for name in pipe.components)


def test_the_text_encoder_is_saved_as_it_is(tiny_folder, tmp_path):
    """Not as it was read: changed weights, and one given by hand."""
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    expected = latents(pipe)
    pipe.save_pretrained(tmp_path / "a")
    other = QwenImagePipeline.from_pretrained(tiny_folder, text_encoder=pipe.text_encoder)
    other.save_pretrained(tmp_path / "b")
    del pipe.text_encoder.weight_files
    QwenImagePipeline(**pipe.components).save_pretrained(tmp_path / "c")
    for folder in "abc":
        assert torch.equal(latents(QwenImagePipeline.from_pretrained(tmp_path / folder)), expected)


@pytest.mark.parametrize("cls", [QwenImagePipeline, QwenImageEditPlusPipeline, QwenImageLayeredPipeline])
def test_how_the_encoder_writes_captions_is_kept(cls, tmp_path):
    """text_encoder/generation_config.json, also through a file of weights; transformers puts its own version in."""
    shutil.copytree(SHIPPED, tmp_path / "model")
    written = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "eos_token_id": [2, 3],
        "transformers_version": "4.52",
    }
    encoder = tmp_path / "model" / "text_encoder"
    (encoder / "generation_config.json").write_text(json.dumps(written))
    whole = cls.writes_captions
    for k, given in enumerate([{}] if whole else [{}, {"text_encoder": encoder / "model.safetensors"}]):
        cls.from_pretrained(tmp_path / "model", **given).save_pretrained(tmp_path / str(k))
        found = json.loads((tmp_path / str(k) / "text_encoder" / "generation_config.json").read_text())
        assert found == {**written, **({"transformers_version": found["transformers_version"]} if whole else {})}


def test_the_home_folder(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for part, place in ((pipe, "~/all"), (pipe.vae, "~/vae"), (pipe.scheduler, "~/scheduler")):
        part.save_pretrained(place)
        assert isinstance(type(part).from_pretrained(place), type(part)) and (tmp_path / place[2:]).is_dir()


def test_saving_in_place_and_without_pickles(tiny_folder, tmp_path):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder)
    expected = latents(pipe)
    pipe.save_pretrained(tmp_path)
    QwenImagePipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert torch.equal(latents(QwenImagePipeline.from_pretrained(tmp_path)), expected)
    for own in (pipe, pipe.vae):
        with pytest.raises(ValueError, match="safe_serialization must be True"):
            own.save_pretrained(tmp_path / "no", safe_serialization=False)
        with pytest.raises(TypeError, match="push_to_hub has no use here: upload the folder"):
            own.save_pretrained(tmp_path / "no", push_to_hub=True)
    pipe.vae.save_pretrained(tmp_path / "rank", is_main_process=False)
    assert not (tmp_path / "no").exists() and not (tmp_path / "rank").exists()


def test_fp8_weights_become_bfloat16(tiny_folder, tmp_path):
    vae = AutoencoderKLQwenImage.from_pretrained(tiny_folder, subfolder="vae")
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = "decoder.conv_in.weight"
    save_file({**state, name: state[name].to(torch.float8_e4m3fn)}, file)
    for dtype in (None, BF16):  # layers do not compute in float8
        read = AutoencoderKLQwenImage.from_pretrained(tmp_path, torch_dtype=dtype)
        assert torch.equal(read.decoder.conv_in.weight, state[name].to(torch.float8_e4m3fn).to(BF16))
        assert {p.dtype for p in read.parameters()} == {BF16}


def test_sizes_of_models(pipe):
    ours, theirs = pipe.vae, diffusers.AutoencoderKLQwenImage(**pipe.vae.config)
    for call in (lambda m: m.num_parameters(), lambda m: m.get_memory_footprint(), lambda m: m.num_parameters(True)):
        assert call(ours) == call(theirs) > 0
    ours.decoder.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) < ours.num_parameters()
    ours.decoder.requires_grad_(True)
