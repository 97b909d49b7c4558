"""diffusers' VAE and ours with the same random weights, inputs, and the rule of errors; for the tests of the VAE."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

from qwen_image_fast.models.vae import AutoencoderKLQwenImage

reference_module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_qwenimage")

TINY = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.0, 2.0, 1.5, 0.5],
}
# Wide enough that most convolutions go by Winograd, of several panels and with a rest.
WIDE = {"base_dim": 20}


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("gamma"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        else:
            value = noise * (3.0 if name == "decoder.conv_out.weight" else 0.5) / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def without_float32_upsample(model):
    """diffusers rounds float64 to float32 in its upsampling; a float64 reference must not."""
    for module in model.modules():
        if isinstance(module, reference_module.QwenImageUpsample):
            module.forward = types.MethodType(nn.Upsample.forward, module)
    return model


@functools.cache
def build(dtype=torch.float64, **changes):
    """(ours, diffusers' model) in `dtype` with the same weights, in eval mode, never to be changed."""
    config = {**TINY, **{name: list(v) if isinstance(v, tuple) else v for name, v in changes.items()}}
    theirs = reference_module.AutoencoderKLQwenImage(**config)
    randomise(theirs)
    theirs = theirs.to(dtype).eval()
    ours = AutoencoderKLQwenImage(**config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if dtype == torch.float64:
        without_float32_upsample(theirs)
    return ours.requires_grad_(False), theirs.requires_grad_(False)


def pair(dtype=torch.float64, **changes):
    """Like `build`, but safe to change."""
    return copy.deepcopy(build(dtype, **changes))


def pixels(*shape, dtype=torch.float64, seed=1):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1).to(dtype)


def latents(*shape, dtype=torch.float64, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual, expected):
    assert actual.dtype == expected.dtype
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def assert_error_at_most(times, ours, theirs, exact):
    for name, size in (("max", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        mine, reference = size(ours.double() - exact), size(theirs.double() - exact)
        assert mine <= times * reference, f"{name} error {mine:.3g}, diffusers {reference:.3g}"


def assert_error_at_most_twice(ours, theirs, exact):
    assert_error_at_most(2, ours, theirs, exact)


def assert_within_tier(ours, theirs, exact, convolution):
    """The rule of exact operations; of the reassociated tier, "auto" in float32, five times diffusers' error and 1/50
    of a step of 255."""
    loose = ours.dtype == torch.float32 and convolution == "auto"
    assert_error_at_most(5 if loose else 2, ours, theirs, exact)
    if ours.dtype == torch.float32:
        assert (ours - exact).abs().max() < 1 / 255 / 50


def gradients(model, x, weight):
    """Gradients of a weighted sum of pixels and moments in every parameter, and in the input."""
    model.requires_grad_(True)
    x = x.clone().requires_grad_(True)
    latent_dist = model.encode(x).latent_dist
    loss = (model.decode(latent_dist.mode()).sample * weight).sum() + latent_dist.logvar.sin().sum()
    loss.backward()
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def outputs(model, x, z):
    return model.encode(x).latent_dist.parameters, model.decode(z).sample


def in_strips(monkeypatch, model, rows):
    monkeypatch.setattr("qwen_image_fast.models.vae.strip_rows", lambda *_: rows)
    model.set_memory_limit(1)
    return model
