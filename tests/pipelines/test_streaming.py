"""Pipelines whose weights are streamed: the same bits as weights that stay, with LoRA and without, and bad input."""

import copy
import logging
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models import streaming
from qwen_image_fast.models.lora import adapters_of
from qwen_image_fast.models.lora_kinds import Adapter, Pair
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.models.vae_conv import packed_bytes
from qwen_image_fast.pipelines import residence
from qwen_image_fast.weights import plan

CALL = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "output_type": "latent", "progress": False}
GUIDED = {"prompt": "a red square", "negative_prompt": " ", "true_cfg_scale": 4.0}
WORKING = 100 * 10**6


@pytest.fixture(autouse=True)
def small_plans(monkeypatch):
    """Plans for the tiny model, which is smaller than what a process takes."""
    monkeypatch.setattr(residence, "resident_bytes", lambda: 0)
    monkeypatch.setattr(residence, "working_of", lambda *_: WORKING)
    monkeypatch.setattr(plan, "_up", lambda size: f"{size} bytes")  # so that the least is no more than that


def least(**options):
    """The smallest limit, which the error of a smaller one names."""
    with pytest.raises(
        ValueError, match=r"memory_limit must be at least (\d+) bytes, got 0.1 GB: the process"
    ) as error:
        QwenImagePipeline.from_pretrained("tiny", memory_limit=WORKING + 10**5, **options)
    return int(re.search(r"at least (\d+) bytes", str(error.value))[1])


def latents(pipe, **more):
    return pipe(**GUIDED, **CALL, **more).images[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("more", [0, 555_555, 10**9], ids=["least", "odd", "all"])
def test_streamed_equals_resident(dtype, more):
    whole = latents(QwenImagePipeline.from_pretrained("tiny", torch_dtype=dtype))
    pipe = QwenImagePipeline.from_pretrained("tiny", torch_dtype=dtype, memory_limit=least(torch_dtype=dtype) + more)
    if more == 10**9:
        assert pipe.transformer.streamed is None and pipe.text_encoder.streamed is None
    else:
        away = [name for name, p in pipe.transformer.named_parameters() if p.is_meta]
        blocks = {int(name.split(".")[1]) for name in away if "attn" in name}
        assert blocks and (more or len(blocks) == len(pipe.transformer.transformer_blocks))
        assert more or any(p.is_meta for p in pipe.text_encoder.parameters())
    assert torch.equal(latents(pipe), whole)
    assert torch.equal(latents(pipe), whole)  # with what was read ahead
    if more != 10**9:
        assert {name for name, p in pipe.transformer.named_parameters() if p.is_meta} == set(away)


def adapter(pipe, magnitude, path="transformer_blocks.1.attn.to_q"):
    generator = torch.Generator().manual_seed(3)
    layer = pipe.transformer.get_submodule(path)
    pair = Pair(
        torch.randn(4, layer.in_features, generator=generator), torch.randn(layer.out_features, 4, generator=generator)
    )
    return Adapter(pair, 0.05, torch.full((layer.out_features, 1), 0.7) if magnitude else None)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_adapters_lie_beside_streamed_weights(magnitude):
    pipes = [QwenImagePipeline.from_pretrained("tiny", **o) for o in ({}, {"memory_limit": least()})]
    plain, found = latents(pipes[0]), []
    for pipe in pipes:
        paths = ["transformer_blocks.1.attn.to_q", "transformer_blocks.0.img_mlp.net.2", "img_in"]
        adapters_of(pipe.transformer).add("a", {path: adapter(pipe, magnitude, path) for path in paths})
        found.append(latents(pipe))
        adapters_of(pipe.transformer).disable()
        assert torch.equal(latents(pipe), plain)
    assert torch.equal(*found) and not torch.equal(found[0], plain)
    adapters_of(pipes[1].transformer).enable()
    with pytest.raises(ValueError, match="fuse_lora: weights that are streamed are not changed"):
        pipes[1].fuse_lora()


def test_pictures_and_a_vision_tower():
    from PIL import Image

    picture = Image.new("RGB", (64, 64), "red")
    call = {**GUIDED, **CALL, "image": [picture]}
    whole = QwenImageEditPlusPipeline.from_pretrained("tiny")(**call).images[0]
    pipe = QwenImageEditPlusPipeline.from_pretrained("tiny", memory_limit=least() + 5 * 10**6)
    assert pipe.transformer.streamed is not None
    assert torch.equal(pipe(**call).images[0], whole)


def test_modulation_weights_are_read_once_for_a_schedule(monkeypatch):
    pipe = QwenImagePipeline.from_pretrained("tiny", memory_limit=least(), free_modulation_weights=True)
    seen = []
    entering = pipe.transformer.streamed.ring.enter
    monkeypatch.setattr(
        pipe.transformer.streamed.ring, "enter", lambda track, i: (seen.append(track), entering(track, i))[1]
    )
    track = pipe.transformer.streamed.tracks["modulation"]
    latents(pipe)
    assert seen.count(track) == len(pipe.transformer.transformer_blocks)
    latents(pipe)
    assert seen.count(track) == len(pipe.transformer.transformer_blocks)


def test_layers_in_8_bits_stay():
    whole = latents(QwenImagePipeline.from_pretrained("tiny", precision="int8"))
    pipe = QwenImagePipeline.from_pretrained("tiny", precision="int8", memory_limit=least(precision="int8"))
    assert pipe.transformer.streamed.tracks.keys() == {"modulation"}
    assert all(".img_mod." in name or ".txt_mod." in name for name in pipe.transformer.streamed.unit_of)
    assert torch.equal(latents(pipe), whole)


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_plans_count_what_is_held(precision, monkeypatch):
    """Weights, buffers, and the VAE's transformed weights after a picture; not the embedding, which is mapped."""
    plans, make = [], residence.make_plan
    monkeypatch.setattr(residence, "make_plan", lambda *a: plans.append(make(*a)) or plans[-1])
    options = {"torch_dtype": torch.bfloat16, "precision": precision}
    pipe = QwenImagePipeline.from_pretrained("tiny", memory_limit=least(**options) + 555_555, **options)
    pipe(**GUIDED, **{**CALL, "output_type": "pil"})
    parts = [pipe.transformer, pipe.vae, pipe.text_encoder]
    tensors = {name: t for part in parts for name, t in (*part.named_parameters(), *part.named_buffers())}
    del tensors["language_model.embed_tokens.weight"]
    held = sum(t.nbytes for t in tensors.values() if not t.is_meta) + packed_bytes(pipe.vae)
    held += sum(slot.buffer.nbytes for slot in pipe.transformer.streamed.ring.slots)
    assert held == pytest.approx(plans[-1].peak - plans[-1].base - WORKING, rel=0.002)


def test_what_a_file_in_8_bits_has_in_floats_is_counted_so(tmp_path, monkeypatch):
    """Its layers in 8 bits are taken as they are, and no others are made; what is left of the blocks stays."""
    QwenImageTransformer2DModel.from_pretrained("tiny", subfolder="transformer", precision="int8").save_pretrained(
        tmp_path
    )
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole, path = load_file(file), "transformer_blocks.2.img_mlp.net.2"
    for suffix in ("weight_scale", "comfy_quant"):
        del whole[f"{path}.{suffix}"]
    whole[f"{path}.weight"] = torch.zeros(192, 768, dtype=torch.bfloat16)
    save_file(whole, file)
    plans, make = [], residence.make_plan
    monkeypatch.setattr(residence, "make_plan", lambda *a: plans.append(make(*a)) or plans[-1])
    options = {"transformer": str(file), "precision": "int8", "torch_dtype": torch.bfloat16}
    pipe = QwenImagePipeline.from_pretrained("tiny", memory_limit=least(**options), **options)
    assert not pipe.transformer.get_submodule(path).weight.is_meta
    kept = {p.name: p for p in plans[-1].parts}["transformer"].kept
    tensors = (*pipe.transformer.parameters(), *pipe.transformer.buffers())
    assert kept == pytest.approx(sum(t.nbytes for t in tensors if not t.is_meta), rel=0.002)


@pytest.mark.parametrize("change", ["replaced", "written", "removed"])
def test_a_file_that_changes_while_it_streams_is_an_error(tmp_path, change):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    pipe = QwenImagePipeline.from_pretrained(folder, memory_limit=least())
    latents(pipe)
    path = next((folder / "transformer").glob("*.safetensors"))
    if change == "replaced":
        shutil.copyfile(path, tmp_path / "new")
        os.replace(tmp_path / "new", path)
    elif change == "written":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    with pytest.raises(OSError, match="was replaced or changed while its weights are streamed; load the model again"):
        latents(pipe)


def test_what_streamed_models_do_not_do(tmp_path):
    pipe = QwenImagePipeline.from_pretrained("tiny", memory_limit=least())
    assert pipe.to("cpu") is pipe and pipe.to(pipe.dtype) is pipe  # where and as it is
    for change in (lambda: pipe.to(torch.float16), lambda: pipe.transformer.half(), lambda: pipe.text_encoder.double()):
        with pytest.raises(ValueError, match="whose weights are streamed stays where and as it is"):
            change()
    for part in (pipe.transformer.save_pretrained, pipe.save_pretrained):
        with pytest.raises(ValueError, match="weights that are streamed are not saved; they are those of"):
            part(tmp_path / "saved")
    with pytest.raises(TypeError, match="streamed cannot be copied"):
        copy.deepcopy(pipe.transformer)
    with pytest.raises(RuntimeError, match="have no gradients: run the model under torch.no_grad"):
        pipe.transformer.modulation(torch.tensor([0.5]))


def test_a_slow_disk_is_said_once(monkeypatch, caplog):
    pipe = QwenImagePipeline.from_pretrained("tiny", memory_limit=least())
    monkeypatch.setattr(streaming, "DISK_RATE", 1e15)
    pipe.transformer.streamed.ring.rate.waited = 1e9
    with caplog.at_level(logging.WARNING):
        latents(pipe)
        latents(pipe)
    assert caplog.text.count("slower than planned") == 1
    assert re.search(r"from \S+safetensors is slower than planned, [\d.]+ [MG]B/s instead of", caplog.text)


def test_a_limit_that_is_no_size():
    with pytest.raises(ValueError, match="memory_limit must be a positive number of bytes or a string like '4GB'"):
        QwenImagePipeline.from_pretrained("tiny", memory_limit="lots")
