"""The VAE's two-dimensional path: Winograd and exact convolutions, strips of rows, kept weights, bad pixels."""

import copy
import gc
import re

import pytest
import torch
from test_vae import (
    assert_error_at_most_twice,
    build,
    gradients,
    latents,
    one_thread,  # noqa: F401 the fixture of that module
    pair,
    pixels,
    without_float32_upsample,
)
from torch import nn

from qwen_image_fast.models import vae_conv
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.models.vae_tiling import parse_bytes, strip_rows

# Wide enough that most convolutions go by Winograd, of several panels and with a rest.
WIDE = {"base_dim": 20}


def outputs(model, x, z):
    return model.encode(x).latent_dist.parameters, model.decode(z).sample


# --- tiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convolution", ["auto", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("height, width", [(72, 40), (8, 8)])
def test_precision(dtype, height, width, convolution):
    """The rule of exact operations: at most twice the reference's error; of the reassociated tier, "auto" in float32,
    three times and 1/50 of a step of 255."""
    ours, theirs = pair(dtype, **WIDE)
    ours.set_convolution(convolution)
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    x, z = pixels(1, 3, 1, height, width, dtype=dtype), latents(1, 4, 1, height // 8, width // 8, dtype=dtype)
    for mine, reference, wanted in zip(
        outputs(ours, x, z), outputs(theirs, x, z), outputs(exact, x.double(), z.double()), strict=True
    ):
        if dtype == torch.float32 and convolution == "auto":
            reference = wanted + 1.5 * (reference.double() - wanted)
        assert_error_at_most_twice(mine, reference, wanted)
        if dtype == torch.float32:
            assert (mine - wanted).abs().max() < 1 / 255 / 50


@pytest.mark.parametrize("convolution", ["auto", "exact"])
def test_gradients(convolution):
    ours, theirs = pair(torch.float32, **WIDE)
    ours.set_convolution(convolution)
    x, weight = pixels(2, 3, 1, 24, 16, dtype=torch.float32), latents(2, 3, 1, 24, 16, dtype=torch.float32)
    actual, expected = gradients(ours, x, weight), gradients(theirs, x, weight)
    for name, grad in expected.items():
        if grad is not None:
            scale = grad.abs().max().item()
            torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-4 * scale, msg=name)


def test_auto_uses_winograd_and_exact_does_not(monkeypatch):
    ours, _ = pair(torch.float32, **WIDE)
    calls = []
    monkeypatch.setattr(vae_conv, "conv3x3", lambda *args: calls.append(args) or kept(*args))
    z = latents(1, 4, 1, 2, 3, dtype=torch.float32)
    auto = ours.decode(z).sample
    assert len(calls) > 10 and vae_conv.packed_bytes(ours) > 0
    calls.clear()
    ours.set_convolution("exact")
    assert vae_conv.packed_bytes(ours) == 0
    exact = ours.decode(z).sample
    assert not calls and not torch.equal(auto, exact)
    ours.set_convolution("auto")
    assert torch.equal(ours.decode(z).sample, auto)


kept = vae_conv.conv3x3


def test_reference_mode():
    from qwen_image_fast import reference

    ours, theirs = build(torch.float32, **WIDE)
    z = latents(1, 4, 1, 2, 3, dtype=torch.float32)
    with reference():
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, rtol=0, atol=2e-5)


def test_set_convolution_knows_two_words():
    with pytest.raises(ValueError, match="convolution must be 'auto' or 'exact', got 'fast'"):
        build()[0].set_convolution("fast")


# --- kept weights -------------------------------------------------------------------------------------------------


def test_weights_written_cast_moved_or_replaced_are_seen():
    ours, _ = pair(torch.float32, **WIDE)
    z = latents(1, 4, 1, 2, 3, dtype=torch.float32)
    conv = ours.decoder.up_blocks[0].resnets[0].conv1

    def check():
        fast = ours.decode(z).sample
        slow = copy.deepcopy(ours)
        slow.set_convolution("exact")
        torch.testing.assert_close(fast, slow.decode(z).sample, rtol=0, atol=2e-5)
        return fast

    seen = [check()]
    with torch.no_grad():
        conv.weight.mul_(0.5)
    seen.append(check())
    conv.weight = nn.Parameter(conv.weight.detach() * 0.5)
    seen.append(check())
    ours.load_state_dict({k: v * 0.9 for k, v in ours.state_dict().items()})
    seen.append(check())
    conv.weight.data = conv.weight.data * 3
    seen.append(check())
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:]))
    ours.double()
    ours.decode(z.double())
    ours.float()
    assert torch.equal(check(), seen[-1])


def test_an_optimizer_step_is_seen():
    ours, _ = pair(torch.float32, **WIDE)
    z = latents(1, 4, 1, 2, 3, dtype=torch.float32)
    before = ours.decode(z).sample
    ours.decoder.requires_grad_(True)
    ours.decode(z).sample.square().mean().backward()
    torch.optim.SGD(ours.decoder.parameters(), lr=0.1).step()
    after = ours.requires_grad_(False).decode(z).sample
    ours.set_convolution("exact")
    torch.testing.assert_close(after, ours.decode(z).sample, rtol=0, atol=2e-5)
    assert not torch.equal(before, after)


def test_kept_weights_leave_with_the_model_and_are_not_copied():
    ours, _ = pair(torch.float32, **WIDE)
    ours.decode(latents(1, 4, 1, 2, 3, dtype=torch.float32))
    gc.collect()
    entries = len(vae_conv._packed)
    assert vae_conv.packed_bytes(copy.deepcopy(ours)) == 0
    weights = sum(vae_conv._packed.get(p) is not None for p in ours.parameters())
    del ours
    gc.collect()
    assert weights > 10 and len(vae_conv._packed) == entries - weights


# --- what the user hangs on modules runs --------------------------------------------------------------------------


def test_hooks_and_other_forwards_run_and_change_the_result():
    ours, _ = pair(torch.float32, **WIDE)
    z = latents(1, 4, 1, 2, 3, dtype=torch.float32)
    plain = ours.decode(z).sample
    block = ours.decoder.up_blocks[1].resnets[0]
    for module in (
        block.norm1,
        block.conv1,
        block.norm2,
        block.conv2,
        ours.decoder.up_blocks[0].upsamplers[0].resample[1],
    ):
        handle = module.register_forward_hook(lambda _, args, out: out * 1.5)
        assert not torch.allclose(ours.decode(z).sample, plain)
        handle.remove()
    conv = block.conv2
    conv.forward = lambda x, stream=None: 0 * type(conv).forward(conv, x, stream)
    assert not torch.allclose(ours.decode(z).sample, plain)
    del conv.forward
    assert torch.equal(ours.decode(z).sample, plain)


def test_compiles_as_a_whole():
    block = build(torch.float32, **WIDE)[0].decoder.up_blocks[1].resnets[0]
    x = latents(1, block.conv1.in_channels, 4, 6, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=1e-4)


def test_autocast():
    ours, theirs = build(torch.float32, **WIDE)
    z = latents(1, 4, 1, 4, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours.decode(z).sample, theirs.decode(z).sample
    exact = ours.decode(z).sample
    error = (expected - exact).abs().max()
    assert 0 < (actual - exact).abs().max() < 3 * error


def test_shapes_without_memory():
    with torch.device("meta"):
        ours = AutoencoderKLQwenImage()
        assert ours(torch.empty(2, 3, 1, 64, 40)).sample.shape == (2, 3, 1, 64, 40)


# --- strips -------------------------------------------------------------------------------------------------------


def in_strips(monkeypatch, model, rows):
    monkeypatch.setattr("qwen_image_fast.models.vae.strip_rows", lambda *_: rows)
    model.set_memory_limit(1)
    return model


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("changes", [{}, {"input_channels": 4, "num_res_blocks": 2}], ids=str)
def test_strips_of_every_height_are_exact(rows, changes, monkeypatch):
    ours, theirs = pair(**changes)
    x, z = pixels(2, changes.get("input_channels", 3), 1, 136, 24), latents(2, 4, 1, 17, 3)
    for actual, expected in zip(outputs(in_strips(monkeypatch, ours, rows), x, z), outputs(theirs, x, z)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


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
    monkeypatch.setattr("qwen_image_fast.models.vae_tiling._OVERHEAD", 0)
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


def test_a_video_is_not_cut_into_strips(monkeypatch):
    ours, theirs = pair()
    x = pixels(1, 3, 5, 16, 8)
    actual = in_strips(monkeypatch, ours, 1).encode(x).latent_dist.mean
    torch.testing.assert_close(actual, theirs.encode(x).latent_dist.mean, rtol=0, atol=1e-9)


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
    texts = {"4GB": 4 * 10**9, " 512 MiB ": 512 << 20, "1.5kb": 1500, "77": 77, 5: 5}
    assert {text: parse_bytes(text) for text in texts} == texts


# --- bad pixels and latents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x * float("nan"), "x must be finite, got values from nan to nan"),
        (lambda x: x / 0, "x must be finite, got values from -inf to inf"),
        (lambda x: (x + 1) * 127.5, "x must lie in [-1, 1], got values from"),
    ],
)
def test_bad_pixels(change, message):
    with pytest.raises(ValueError, match=re.escape(f"AutoencoderKLQwenImage.encode: {message}")):
        build()[0].encode(change(pixels(1, 3, 1, 8, 8)))


def test_pixels_without_a_negative_value_are_warned_about():
    ours, _ = build()
    x = pixels(1, 3, 1, 8, 8)
    with pytest.warns(
        UserWarning, match=r"x must lie in \[-1, 1\], got no negative value .* convert them with 2 \* x - 1"
    ):
        ours.encode((x + 1) / 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_latents(value):
    z = latents(1, 4, 1, 2, 3)
    z[0, 1, 0, 1, 1] = value
    with pytest.raises(ValueError, match=f"AutoencoderKLQwenImage.decode: z must be finite, got values from .*{value}"):
        build()[0].decode(z)


# --- photographs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype, steps",
    [
        ("astronaut", torch.float32, 0.02),
        ("coffee", torch.float32, 0.02),
        ("chelsea", torch.bfloat16, 6.0),
        ("rocket", torch.float16, 1.0),
    ],
    ids=str,
)
def test_round_trip_of_photographs(name, dtype, steps):
    """A part of the picture through encoder and decoder, against diffusers: steps of 255."""
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(getattr(data, name)()[60:132, 40:80].copy()).permute(2, 0, 1)[None, :, None]
    x = (image.to(torch.float32) / 127.5 - 1).to(dtype)
    ours, theirs = build(dtype, **WIDE)
    actual, expected = (m.decode(m.encode(x).latent_dist.mode()).sample.float() for m in (ours, theirs))
    assert expected.std() > 0.05
    assert (actual - expected).abs().max() * 127.5 < steps
