"""Results are read in all the ways in which diffusers' are."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.utils._pytree import tree_map

from qwen_image_fast import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImagePipeline,
)

CALL = {"prompt": ["a red cat", "a dog"], "height": 32, "width": 48, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


@pytest.mark.parametrize(
    "kind, shape", [("np", (2, 32, 48, 3)), ("pt", (2, 3, 32, 48)), ("latent", (2, 6, 64)), ("pil", None)]
)
def test_pictures(pipe, kind, shape):
    out = pipe(**CALL, output_type=kind, progress=False)
    (alone,) = pipe(**CALL, output_type=kind, progress=False, return_dict=False)
    for images in (out.images, out[0], out["images"], out.to_tuple()[0], out.values()[0], dict(out)["images"], alone):
        assert getattr(images, "shape", None) == shape and len(images) == 2
        for ours, expected in zip(images, out.images):
            assert np.array_equal(np.asarray(ours), np.asarray(expected))
    assert "images" in out and "sample" not in out and next(iter(out)) == "images"
    with pytest.raises(KeyError):
        out["sample"]


def test_pictures_of_different_sizes_are_a_list(pipe):
    images = pipe(**{**CALL, "height": [32, 64]}, output_type="np", progress=False)[0]
    assert [i.shape for i in images] == [(32, 48, 3), (64, 48, 3)] and isinstance(images, list)


def test_tensors_in_them_are_found(pipe):
    """As torch.export, FSDP and DistributedDataParallel look for them."""
    out = pipe(**CALL, output_type="latent", progress=False)
    doubled = tree_map(lambda leaf: 2 * leaf if isinstance(leaf, torch.Tensor) else leaf, out)
    assert type(doubled) is type(out) and torch.equal(doubled.images, 2 * out.images)
    assert doubled.seeds == out.seeds and doubled.prompts == out.prompts


def test_models(pipe):
    vae, x = pipe.vae, torch.zeros(1, 3, 1, 16, 16)
    z = vae.encode(x)["latent_dist"].mode()
    assert torch.equal(vae.encode(x)[0].mode(), z) and torch.equal(vae.encode(x, return_dict=False)[0].mode(), z)
    out = vae.decode(z)
    theirs = DecoderOutput(sample=out.sample)
    for read in (lambda o: o[0], lambda o: o["sample"], lambda o: o.to_tuple()[0], lambda o: next(iter(o.values()))):
        assert torch.equal(read(out), read(theirs))
    assert list(out) == list(theirs) and len(out) == len(theirs)

    ours, theirs = FlowMatchEulerDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(2)
    step = torch.ones(1, 2, 2), ours.timesteps[0], torch.zeros(1, 2, 2)
    assert torch.equal(ours.step(*step)["prev_sample"], theirs.step(*step)[0])


def test_the_transformers_output(pipe):
    out = pipe.transformer(
        torch.zeros(1, 4, 64), torch.zeros(1, 3, pipe.transformer.config.joint_attention_dim),
        timestep=torch.tensor([0.5]), img_shapes=[[(1, 2, 2)]],
    )  # fmt: skip
    assert out[0] is out["sample"] is out.sample and isinstance(pipe.vae, AutoencoderKLQwenImage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["transformer", "controlnet"])
def test_inputs_become_the_type_of_the_weights(pipe, kind, dtype):
    torch.manual_seed(0)
    model = pipe.transformer
    if kind == "controlnet":
        model = QwenImageControlNetModel.from_transformer(model, num_layers=1)
        torch.nn.init.normal_(model.controlnet_blocks[0].weight)
    inputs = {"hidden_states": torch.randn(1, 4, 64, dtype=dtype)}
    inputs["encoder_hidden_states"] = torch.randn(1, 3, model.config.joint_attention_dim, dtype=dtype)
    inputs |= {"controlnet_cond": inputs["hidden_states"].flip(0)} if kind == "controlnet" else {}
    fixed = {"timestep": torch.tensor([0.5]), "img_shapes": [[(1, 2, 2)]], "return_dict": False}
    with torch.no_grad():
        expected = model(**{name: t.float() for name, t in inputs.items()}, **fixed)[0]
        got = model(**inputs, **fixed)[0]
    assert got.dtype == torch.float32 and torch.equal(got, expected) and got.abs().max() > 0
