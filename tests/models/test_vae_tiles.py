"""The VAE in parts: exact strips of rows under a memory limit, diffusers' blended tiles, slices of a batch."""

import copy
import re

import pytest
import torch
from vae_harness import (
    WIDE,
    assert_within_tier,
    build,
    close,
    in_strips,
    latents,
    outputs,
    pair,
    pixels,
    without_float32_upsample,
)

from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.models.vae_tiling import strip_rows
from qwen_image_fast.sizes import parse_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

# --- strips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("changes", [{}, {"input_channels": 4, "num_res_blocks": 2}], ids=str)
def test_strips_of_every_height_are_exact(rows, changes, monkeypatch):
    ours, theirs = pair(**changes)
    x, z = pixels(2, changes.get("input_channels", 3), 1, 136, 24), latents(2, 4, 1, 17, 3)
    for actual, expected in zip(outputs(in_strips(monkeypatch, ours, rows), x, z), outputs(theirs, x, z)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [3, 4])
def test_precision_of_strips(dtype, channels, monkeypatch):
    ours, theirs = pair(dtype, **WIDE, input_channels=channels)
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    x, z = pixels(1, channels, 1, 56, 40, dtype=dtype), latents(1, 4, 1, 7, 5, dtype=dtype)
    references, wanted = outputs(theirs, x, z), outputs(exact, x.double(), z.double())
    for mine, reference, value in zip(outputs(in_strips(monkeypatch, ours, 2), x, z), references, wanted, strict=True):
        assert_within_tier(mine, reference, value, "auto")


@pytest.mark.parametrize("convolution", ["auto", "exact"])
def test_strips_in_float32(convolution, monkeypatch):
    ours, _ = pair(torch.float32, **WIDE)
    ours.set_convolution(convolution)
    x, z = pixels(1, 3, 1, 136, 200, dtype=torch.float32), latents(1, 4, 1, 17, 25, dtype=torch.float32)
    whole = outputs(ours, x, z)
    for rows in (1, 4, 6):
        for a, b in zip(outputs(in_strips(monkeypatch, ours, rows), x, z), whole):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_strips_pass_gradients_and_hooks(monkeypatch):
    ours, theirs = pair()
    z = latents(1, 4, 1, 5, 2)
    found = []
    for model in (in_strips(monkeypatch, ours, 2), theirs):
        leaf = z.clone().requires_grad_()
        if model is ours:
            for module in (
                ours.decoder.up_blocks[0].resnets[0].norm2,
                ours.decoder.up_blocks[0].upsamplers[0].resample[1],
            ):
                module.register_forward_hook(lambda *_: None)
        model.decode(leaf).sample.sin().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_memory_limit_chooses_the_strips(monkeypatch):
    monkeypatch.setattr("qwen_image_fast.picture_memory.OVERHEAD", 0)
    ours, _ = pair(torch.float32)
    seen = []
    ours.decoder.up_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    z = latents(1, 4, 1, 24, 16, dtype=torch.float32)
    whole = ours.decode(z).sample
    for limit in ("1GB", 5_000_000, "2.5 MB", None):
        seen.clear()
        ours.set_memory_limit(limit)
        torch.testing.assert_close(ours.decode(z).sample, whole, rtol=0, atol=1e-5)
        assert sum(seen) == 24
        assert (len(seen) == 1) == (limit in ("1GB", None)), (limit, seen)
    rows = [strip_rows(ours.config, 64, 64, 4, limit) for limit in (10**10, 6 * 10**7, 2 * 10**7)]
    assert rows[0] is None and rows[1] > rows[2] >= 1


def test_no_block_sees_more_rows_than_a_strip(monkeypatch):
    """Not even at the end, where all rows are completed that the layers lag behind."""
    ours, _ = pair()
    seen = []
    for doublings, block in enumerate(ours.decoder.up_blocks):
        block.register_forward_pre_hook(
            lambda _, args, doublings=doublings: seen.append((doublings, args[0].shape[2] / 2**doublings))
        )
    in_strips(monkeypatch, ours, 3).decode(latents(1, 4, 1, 17, 2))
    assert max(rows for _, rows in seen) == 3
    for doublings in range(4):
        assert sum(rows for level, rows in seen if level == doublings) == 17


def test_memory_stays_under_the_limit():
    benchmarks = pytest.importorskip("benchmarks.harness")
    with torch.no_grad():
        ours = AutoencoderKLQwenImage(base_dim=16, num_res_blocks=1).eval()
        z = latents(1, 16, 1, 16, 128, dtype=torch.float32)
        ours.decode(z)  # the weights are transformed, and malloc has warmed up
        z = latents(1, 16, 1, 96, 128, dtype=torch.float32)
        limit = 200 << 20
        ours.set_memory_limit(limit)
        peak = benchmarks.peak_extra_memory(lambda: ours.decode(z), "cpu")
    if peak == 0:
        pytest.skip("the peak of resident memory is read from Linux")
    assert strip_rows(ours.config, 96, 128, 4, limit) and peak < limit


@pytest.mark.parametrize("method, x", [("encode", pixels(1, 3, 5, 16, 8)), ("decode", latents(1, 4, 3, 2, 1))])
def test_a_video_under_a_memory_limit(method, x):
    ours, _ = pair()
    ours.set_memory_limit("4GB")
    message = f"AutoencoderKLQwenImage.{method}: memory_limit must be None for a video, got {x.shape[2]} frames: only "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(ours, method)(x)
    ours.set_memory_limit(None)
    getattr(ours, method)(x)


@pytest.mark.parametrize(
    "limit, message",
    [
        (0, "memory_limit must be a positive number of bytes or a string like '4GB', got 0"),
        ("four", "memory_limit must be a positive number of bytes or a string like '4GB', got 'four'"),
        (1.5, "memory_limit must be a positive number of bytes or a string like '4GB', got 1.5"),
    ],
)
def test_bad_limits(limit, message):
    with pytest.raises(ValueError, match=re.escape(f"AutoencoderKLQwenImage.set_memory_limit: {message}")):
        build()[0].set_memory_limit(limit)


def test_a_limit_too_small_for_one_strip():
    ours, _ = pair()
    ours.set_memory_limit("1KB")
    message = (
        r"AutoencoderKLQwenImage.decode: memory_limit must be at least \d+ bytes for an image of 16 x 24, got 1000"
    )
    with pytest.raises(ValueError, match=message):
        ours.decode(latents(1, 4, 1, 2, 3))
    with pytest.raises(ValueError, match="AutoencoderKLQwenImage.encode: memory_limit must be at least"):
        ours.encode(pixels(1, 3, 1, 16, 24))


def test_attention_at_full_resolution_needs_the_whole_image(monkeypatch):
    ours = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, attn_scales=[1.0], latents_mean=[0], latents_std=[1]
    )
    with pytest.raises(ValueError, match="encode: memory_limit must be None for an encoder with attn_scales"):
        in_strips(monkeypatch, ours, 1).encode(torch.zeros(1, 3, 1, 16, 8))


def test_bytes():
    texts = {"4GB": 4 * 10**9, " 512 MiB ": 512 << 20, "1.5kb": 1500, "77000000": 77000000, 5: 5}
    assert {text: parse_bytes(text) for text in texts} == texts


# --- tiles and slices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tiles, frames, height, width",
    [
        ((16, 16, 8, 8), 1, 40, 24),
        ((32, 24, 16, 8), 1, 40, 56),
        ((16, 32, 16, 24), 1, 40, 48),
        ((32, 16, 24, 8), 1, 16, 24),
        ((32, 32, 8, 16), 1, 32, 32),
        ((16, 16, 8, 8), 5, 16, 24),
        ((16, 32, 16, 24), 5, 24, 40),
    ],
    ids=str,
)
def test_tiling(tiles, frames, height, width):
    ours, theirs = pair()
    x = pixels(1, 3, frames, height, width)
    z = latents(1, 4, 1 + (frames - 1) // 4, height // 8, width // 8)
    whole = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    for model in (ours, theirs):
        model.enable_tiling(*tiles)
    assert ours.use_tiling
    moments, sample = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    close(moments, theirs.encode(x).latent_dist.parameters)
    close(sample, theirs.decode(z).sample)
    if height > tiles[0] or width > tiles[1]:
        assert not torch.allclose(moments, whole[0])
    ours.disable_tiling()
    assert not ours.use_tiling
    close(ours.tiled_encode(x), theirs.tiled_encode(x))
    close(ours.tiled_decode(z).sample, theirs.tiled_decode(z).sample)
    assert torch.equal(ours.tiled_decode(z, return_dict=False)[0], ours.tiled_decode(z).sample)
    assert torch.equal(ours.encode(x).latent_dist.parameters, whole[0])
    assert torch.equal(ours.decode(z).sample, whole[1])


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("tile, stride", [(24, 16), (16, 16), (32, 8)])
def test_tiles_of_every_alignment(tile, stride, frames):
    """Images of every size up to a few tiles: the last tile has every length, on each axis."""
    ours, theirs = pair()
    for model in (ours, theirs):
        model.enable_tiling(tile, tile, stride, stride)
    for rows in range(1, 8):
        z = latents(1, 4, 1 + (frames - 1) // 4, rows, 8 - rows)
        close(ours.decode(z).sample, theirs.decode(z).sample)
        x = pixels(1, 3, frames, 8 * rows, 8 * (8 - rows))
        close(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)


def test_tiles_of_what_cannot_be_meant():
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"AutoencoderKLQwenImage\.tiled_encode: x must lie in \[-1, 1\]"):
        ours.tiled_encode(255 * pixels(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match=r"AutoencoderKLQwenImage\.tiled_decode: z must have 4 channels, got 3"):
        ours.tiled_decode(latents(1, 3, 1, 2, 2))


def test_tiles_are_not_clamped():
    ours, _ = pair()
    ours.enable_tiling(16, 16, 8, 8)
    assert ours.decode(latents(1, 4, 1, 4, 4)).sample.abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels, frames", [(3, 1), (4, 1), (4, 5)])
def test_precision_of_tiling(channels, frames, dtype):
    ours, theirs = pair(dtype, **WIDE, input_channels=channels)
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    for model in (ours, theirs, exact):
        model.enable_tiling(16, 16, 8, 8)
    x = pixels(1, channels, frames, 24, 32, dtype=dtype)
    z = latents(1, 4, 1 + (frames - 1) // 4, 4, 3, dtype=dtype)
    wanted = outputs(exact, x.double(), z.double())
    for mine, reference, value in zip(outputs(ours, x, z), outputs(theirs, x, z), wanted, strict=True):
        assert_within_tier(mine, reference, value, "auto" if frames == 1 else "exact")


def test_gradients_flow_through_tiles():
    found = []
    for model in pair():
        model.enable_tiling(16, 16, 8, 8)
        z = latents(1, 4, 1, 3, 4).requires_grad_(True)
        model.decode(z).sample.square().sum().backward()
        found.append(z.grad)
    close(*found)


@pytest.mark.parametrize("tiled", [False, True])
def test_slicing(tiled):
    ours, theirs = pair()
    for model in (ours, theirs):
        model.enable_slicing()
        if tiled:
            model.enable_tiling(16, 16, 8, 8)
    assert ours.use_slicing
    sizes = []
    ours.encoder.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ours.decoder.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x, z = pixels(3, 3, 1, 24, 16), latents(3, 4, 1, 3, 2)
    close(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
    close(ours.decode(z).sample, theirs.decode(z).sample)
    assert set(sizes) == {1}
    ours.disable_slicing()
    assert not ours.use_slicing
    ours.decode(z)
    assert sizes[-1] == 3
