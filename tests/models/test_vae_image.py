"""The VAE's two-dimensional path: Winograd and exact convolutions, kept weights, bad pixels."""

import copy
import gc
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode
from vae_harness import (
    WIDE,
    assert_within_tier,
    build,
    gradients,
    latents,
    outputs,
    pair,
    pixels,
    without_float32_upsample,
)

from qwen_image_fast.models import vae_conv
from qwen_image_fast.models.hooks import is_bare
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.models.vae_blocks import AttentionBlock

pytestmark = pytest.mark.usefixtures("one_thread")

# --- tiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convolution", ["auto", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels, height, width", [(3, 72, 40), (3, 8, 8), (4, 24, 56)])
def test_precision(dtype, channels, height, width, convolution):
    ours, theirs = pair(dtype, **WIDE, input_channels=channels)
    ours.set_convolution(convolution)
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    x = pixels(1, channels, 1, height, width, dtype=dtype)
    z = latents(1, 4, 1, height // 8, width // 8, dtype=dtype)
    for mine, reference, wanted in zip(
        outputs(ours, x, z), outputs(theirs, x, z), outputs(exact, x.double(), z.double()), strict=True
    ):
        assert_within_tier(mine, reference, wanted, convolution)


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


def test_kept_weights_are_as_many_as_plans_count():
    ours, _ = pair(torch.float32, **WIDE)
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    ours.decode(latents(1, 4, 1, 2, 3, dtype=torch.float32))
    assert vae_conv.packed_bytes(ours) == vae_conv.packed_bytes_of(shapes, 4, cuda=False, encodes=False)
    ours.encode(pixels(1, 3, 1, 16, 24, dtype=torch.float32))
    assert vae_conv.packed_bytes(ours) == vae_conv.packed_bytes_of(shapes, 4, cuda=False, encodes=True)
    with torch.device("meta"):
        released = {name: p.shape for name, p in AutoencoderKLQwenImage().named_parameters()}
    found = [vae_conv.packed_bytes_of(released, 2, cuda=False, encodes=encodes) for encodes in (False, True)]
    assert [round(n / 1e6) for n in found] == [466, 736]  # docs/vae.md


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


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook, nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook, nn_module.register_module_full_backward_pre_hook,
    ],
)  # fmt: skip
def test_hooks_on_all_modules_are_seen_by_every_torch(register, monkeypatch):
    monkeypatch.delattr(nn_module, "_has_any_global_hook", raising=False)  # as before torch 2.8
    conv = torch.nn.Conv2d(1, 1, 1)
    assert is_bare(conv)
    handle = register(lambda *_: None)
    try:
        assert not is_bare(conv)
    finally:
        handle.remove()
    assert is_bare(conv)


def test_compiles_as_a_whole():
    block = build(torch.float32, **WIDE)[0].decoder.up_blocks[1].resnets[0]
    x = latents(1, block.conv1.in_channels, 4, 6, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=1e-4)


class Called(TorchDispatchMode):
    """The names of the functions of torch that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_writes_no_scores(dtype, gradients):
    """torch has another way, which does; of the width of the released model."""
    attention = AttentionBlock(384).to(dtype)
    with Called() as called, torch.set_grad_enabled(gradients):
        attention(latents(2, 384, 3, 5, dtype=dtype))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called.names
    assert not any("softmax" in name or "math" in name for name in called.names)


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
    x[0, 0, 0, 0, 0] = -1
    with pytest.warns(
        UserWarning, match=r"x must lie in \[-1, 1\], got no negative value .* convert them with 2 \* x - 1"
    ):
        ours.encode((x + 1) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bright_picture_is_not_warned_about(dtype):
    ours = build()[0].to(dtype)
    bright = torch.randint(128, 256, (1, 3, 1, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    bright[0, 0, 0, 0, 0] = 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.encode((bright / 127.5 - 1).to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_latents(value):
    z = latents(1, 4, 1, 2, 3)
    z[0, 1, 0, 1, 1] = value
    with pytest.raises(ValueError, match=f"AutoencoderKLQwenImage.decode: z must be finite, got values from .*{value}"):
        build()[0].decode(z)
