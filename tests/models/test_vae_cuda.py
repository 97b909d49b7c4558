"""The VAE's path on CUDA, computed here by torch's convolutions on the CPU: folded upsampling, residuals, strips."""

import copy

import pytest
import torch
from vae_harness import (
    WIDE,
    assert_error_at_most_twice,
    gradients,
    in_strips,
    latents,
    outputs,
    pair,
    pixels,
    without_float32_upsample,
)

from qwen_image_fast import accelerate
from qwen_image_fast.models import vae_conv

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(vae_conv, "uses_cuda", lambda conv, x: True)


@pytest.mark.parametrize("convolution", ["auto", "exact"])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_the_path_of_cuda_is_exact(rows, convolution, as_on_cuda, monkeypatch):
    ours, theirs = pair()
    ours.set_convolution(convolution)
    x, z = pixels(2, 3, 1, 40, 24), latents(2, 4, 1, 5, 3)
    expected = outputs(theirs, x, z)
    for actual, wanted in zip(outputs(ours if rows is None else in_strips(monkeypatch, ours, rows), x, z), expected):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("convolution", ["auto", "exact"])
def test_precision_of_the_path_of_cuda(dtype, convolution, as_on_cuda):
    """Folded weights of upsampling are rounded once more, and keep to the rule."""
    ours, theirs = pair(dtype, **WIDE)
    ours.set_convolution(convolution)
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    x, z = pixels(2, 3, 1, 40, 24, dtype=dtype), latents(2, 4, 1, 5, 3, dtype=dtype)
    wanted = outputs(exact, x.double(), z.double())
    for mine, reference, value in zip(outputs(ours, x, z), outputs(theirs, x, z), wanted, strict=True):
        assert_error_at_most_twice(mine, reference, value)


def test_gradients_of_the_path_of_cuda(as_on_cuda):
    ours, theirs = pair()
    x, weight = pixels(1, 3, 1, 16, 24), latents(1, 3, 1, 16, 24)
    actual, expected = gradients(ours, x, weight), gradients(theirs, x, weight)
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-9 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sums_of_the_path_of_cuda(dtype, as_on_cuda, monkeypatch):
    """Without gradients a residual block asks for two passes: the bias of conv1 with norm2, that of conv2 with the
    residual. No convolution of a block gets a bias; the numbers are those of torch's sums."""
    ours, theirs = pair(dtype)
    calls, biases = [], []
    add, conv = vae_conv.add_channel_norm_silu, vae_conv.conv2d
    monkeypatch.setattr(
        vae_conv, "add_channel_norm_silu",
        lambda x, added, residual=None, gamma=None, inplace=False: (
            calls.append((residual is not None, gamma is not None)) or add(x, added, residual, gamma, inplace)
        ),
    )  # fmt: skip
    monkeypatch.setattr(vae_conv, "conv2d", lambda x, w, b, *rest: biases.append(b) or conv(x, w, b, *rest))
    block = ours.decoder.mid_block.resnets[0]
    x = torch.randn(1, block.conv1.weight.shape[1], 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    with torch.no_grad():
        out = block(x)
    assert calls == [(False, True), (True, False)] and biases == [None, None] and torch.equal(x, kept)
    accelerate(theirs)
    with torch.no_grad():
        assert torch.equal(theirs.decoder.mid_block.resnets[0](x.unsqueeze(2)).squeeze(2), out)
    assert calls[2:] == calls[:2] and biases == [None] * 4 and torch.equal(x, kept)
    expected = block(x)
    assert len(calls) == 4 and None not in biases[4:]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=4 * eps, atol=4 * eps * expected.abs().max().item())


def test_kept_weights_of_the_path_of_cuda(as_on_cuda):
    ours, _ = pair()
    z = latents(1, 4, 1, 2, 3)
    before, kept_bytes = ours.decode(z).sample, vae_conv.packed_bytes(ours)
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    counted = vae_conv.packed_bytes_of(shapes, before.element_size(), cuda=True, encodes=False)
    assert kept_bytes <= counted < 1.05 * kept_bytes
    with torch.no_grad():
        ours.decoder.up_blocks[0].upsamplers[0].resample[1].weight.mul_(0.5)
    assert kept_bytes > 0 and not torch.equal(ours.decode(z).sample, before)
