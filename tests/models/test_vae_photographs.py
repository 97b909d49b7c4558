"""Photographs through encoder and decoder, against diffusers: whole ones in the trained tiny VAE, parts of them in one
as wide as the released."""

import copy
import functools

import pytest
import torch
from vae_harness import (
    assert_within_tier,
    pair,
    reference_module,
    without_float32_upsample,
)

from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models import vae_conv
from qwen_image_fast.models.vae import AutoencoderKLQwenImage

pytestmark = pytest.mark.usefixtures("one_thread")

data = pytest.importorskip("skimage.data")


def photograph(name, dtype, rows=slice(None), columns=slice(None)):
    """Cut to multiples of 8, in [-1, 1]."""
    pixels = getattr(data, name)()[rows, columns]
    height, width = (n // 8 * 8 for n in pixels.shape[:2])
    image = torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1)[None, :, None]
    return (image.float() / 127.5 - 1).to(dtype)


@functools.cache
def shipped(dtype):
    """(ours, diffusers' model, that in float64 with the weights of `dtype`), the VAE of the tiny Qwen-Image."""
    classes = AutoencoderKLQwenImage, reference_module.AutoencoderKLQwenImage
    ours, theirs = (c.from_pretrained(SHIPPED / "vae").to(dtype).eval().requires_grad_(False) for c in classes)
    return ours, theirs, without_float32_upsample(copy.deepcopy(theirs).double())


def round_trip(model, x):
    """The moments of an image, and the image that comes back."""
    latent_dist = model.encode(x).latent_dist
    return latent_dist.parameters, model.decode(latent_dist.mode()).sample


def compare(ours, theirs, exact, x, tiers):
    """Each convolution within a tier; how far the pixels of "auto" and of diffusers are apart, in steps of 255."""
    reference, wanted = round_trip(theirs, x), round_trip(exact, x.double())
    assert wanted[1].std() > 0.1
    for convolution, tier in tiers.items():
        ours.set_convolution(convolution)
        found = round_trip(ours, x)
        for mine, theirs_, value in zip(found, reference, wanted, strict=True):
            assert_within_tier(mine, theirs_, value, tier)
    return ((found[1].double() - reference[1].double()).abs() * 127.5).max().item()


@pytest.mark.parametrize(
    "name, dtype", [("astronaut", torch.float32), ("coffee", torch.bfloat16), ("chelsea", torch.float16)], ids=str
)
def test_whole_photographs(name, dtype):
    steps = compare(*shipped(dtype), photograph(name, dtype), {"exact": "exact", "auto": "auto"})
    assert dtype != torch.float32 or steps < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_released_width(dtype):
    """In float32 the looser tier for both: torch's own two-dimensional convolutions sum so many products in another
    order than its three-dimensional ones, and err up to three times as much."""
    ours, theirs = pair(dtype, base_dim=96, z_dim=16, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    part = photograph("rocket", dtype, slice(60, 84), slice(240, 280))
    steps = compare(ours, theirs, exact, part, {"exact": "auto", "auto": "auto"})
    assert dtype != torch.float32 or steps < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_folded_upsampling_of_cuda(dtype, monkeypatch):
    """Its arithmetic, by torch's convolutions on the CPU: weights that are summed and rounded once more add less than a
    quarter to the error of this dtype; in float32 no pixel changes by a step of 255."""
    monkeypatch.setattr(vae_conv, "uses_cuda", lambda conv, x: True)
    ours, _, exact = shipped(dtype)
    z = exact.encode(photograph("chelsea", torch.float64, slice(60, 188), slice(100, 260))).latent_dist.mode().to(dtype)
    wanted, found = exact.decode(z.double()).sample, {}
    for convolution in ("auto", "exact"):
        ours.set_convolution(convolution)
        found[convolution] = ours.decode(z).sample.double()
    rms = {name: (image - wanted).square().mean().sqrt() for name, image in found.items()}
    assert not torch.equal(found["auto"], found["exact"]) and rms["auto"] < 1.25 * rms["exact"]
    if dtype == torch.float32:
        assert (found["auto"] - found["exact"]).abs().max() < 1 / 255 / 50
