"""The VAE against diffusers' own class with the same random weights."""

import copy
import re

import pytest
import torch
from torch import nn
from vae_harness import (
    TINY,
    assert_error_at_most_twice,
    build,
    close,
    gradients,
    latents,
    pair,
    pixels,
    randomise,
    reference_module,
    without_float32_upsample,
)

from qwen_image_fast.models.vae import AutoencoderKLQwenImage, DiagonalGaussianDistribution
from qwen_image_fast.models.vae_blocks import ChannelRMSNorm

pytestmark = pytest.mark.usefixtures("one_thread")

reference_gaussian = pytest.importorskip("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution


# --- configuration and state dict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"input_channels": 4}, {"attn_scales": [1.0, 0.25]}], ids=str)
def test_state_dict_has_the_names_and_shapes_of_diffusers(changes):
    with torch.device("meta"):
        ours = AutoencoderKLQwenImage(**changes)
        theirs = reference_module.AutoencoderKLQwenImage(**changes)
    shapes = [[(name, value.shape) for name, value in model.state_dict().items()] for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert dict(ours.config) == {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    for name in (
        *("z_dim", "temperal_downsample", "temperal_upsample", "spatial_compression_ratio", "use_tiling"),
        *("use_slicing", "tile_sample_min_height", "tile_sample_min_width"),
        *("tile_sample_stride_height", "tile_sample_stride_width"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


# --- parity in float64 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"input_channels": 4}, {"num_res_blocks": 2, "dim_mult": (2, 1, 3, 1)}], ids=str
)
@pytest.mark.parametrize("frames, height, width", [(1, 24, 40), (1, 8, 8), (5, 8, 24), (13, 16, 8)])
def test_encode_decode_and_round_trip(changes, frames, height, width):
    ours, theirs = build(**changes)
    x = pixels(2, changes.get("input_channels", 3), frames, height, width)
    actual, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    close(actual.parameters, expected.parameters)
    assert actual.mode().shape == (2, 4, 1 + (frames - 1) // 4, height // 8, width // 8)

    z = latents(*actual.mean.shape)
    sample = ours.decode(z).sample
    close(sample, theirs.decode(z).sample)
    assert sample.shape == x.shape
    assert sample.is_contiguous()

    for posterior in (False, True):
        outputs = [m(x, posterior, True, torch.Generator().manual_seed(3)).sample for m in (ours, theirs)]
        close(*outputs)


def test_decoded_pixels_are_clamped():
    ours, theirs = build()
    z = latents(1, 4, 1, 3, 5)
    sample = ours.decode(z).sample
    clamped = (sample.abs() == 1).double().mean()
    assert 0 < clamped < 0.5
    close(sample, theirs.decode(z).sample)


@pytest.mark.parametrize("temporal", [(True, False, True), (False, False, False), (True, True, False)], ids=str)
def test_which_stages_change_time(temporal):
    ours, theirs = build(temperal_downsample=temporal)
    x = pixels(1, 3, 9, 8, 16)
    z = ours.encode(x).latent_dist.mode()
    close(z, theirs.encode(x).latent_dist.mode())
    close(ours.decode(z[:, :, :3]).sample, theirs.decode(z[:, :, :3]).sample)


def test_attention_in_the_encoder():
    """diffusers' encoder fails when attn_scales is not empty (it gives the attention block arguments it does not take);
    its layers, called without a cache on one frame, are the reference."""
    config = {**TINY, "attn_scales": [1.0, 0.25]}
    theirs = reference_module.AutoencoderKLQwenImage(**config)
    randomise(theirs)
    theirs = theirs.double().eval()
    ours = AutoencoderKLQwenImage(**config).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = pixels(2, 3, 1, 16, 24)
    with torch.no_grad():
        close(ours.encode(x).latent_dist.parameters, theirs.quant_conv(theirs.encoder(x)))


def test_one_frame_equals_the_first_frame_of_a_video():
    ours, _ = build()
    x = pixels(1, 3, 5, 16, 16)
    video, image = ours.encode(x).latent_dist.mean, ours.encode(x[:, :, :1]).latent_dist.mean
    close(image, video[:, :, :1])
    close(ours.decode(video[:, :, :1]).sample, ours.decode(video).sample[:, :, :1])


def test_a_batch_equals_its_samples_and_nothing_is_remembered_between_calls():
    ours, _ = build()
    for frames in (1, 5):
        x = pixels(3, 3, frames, 16, 16)
        together = ours.encode(x).latent_dist.parameters
        close(together, torch.cat([ours.encode(part).latent_dist.parameters for part in x.split(1)]))
        assert torch.equal(together, ours.encode(x).latent_dist.parameters)


@pytest.mark.parametrize("frames", [1, 5])
def test_memory_layout_of_the_input_does_not_matter(frames):
    ours, _ = build()
    x = pixels(2, 3, frames, 16, 24)
    strided = x.transpose(3, 4).contiguous().transpose(3, 4)
    close(ours.encode(strided).latent_dist.parameters, ours.encode(x).latent_dist.parameters)


# --- float32 and 16 bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.float32, (2, 1, 24, 40)),
        (torch.float32, (1, 5, 16, 24)),
        (torch.float32, (1, 1, 96, 96)),
        (torch.bfloat16, (4, 1, 40, 48)),
        (torch.bfloat16, (2, 5, 16, 24)),
        (torch.float16, (4, 1, 40, 48)),
        (torch.float16, (2, 5, 16, 24)),
    ],
    ids=str,
)
def test_precision(dtype, shape):
    batch, frames, height, width = shape
    ours, theirs = build(dtype)
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    x = pixels(batch, 3, frames, height, width, dtype=dtype)
    actual = ours.encode(x).latent_dist.parameters
    assert actual.dtype == dtype
    wanted = exact.encode(x.double()).latent_dist.parameters
    assert_error_at_most_twice(actual, theirs.encode(x).latent_dist.parameters, wanted)

    z = latents(batch, 4, 1 + (frames - 1) // 4, height // 8, width // 8, dtype=dtype)
    sample = ours.decode(z).sample
    assert sample.dtype == dtype
    assert_error_at_most_twice(sample, theirs.decode(z).sample, exact.decode(z.double()).sample)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm_rounds_like_diffusers(dtype):
    """A video, to the bit; an image is rounded once only."""
    ours, theirs = ChannelRMSNorm(6).to(dtype), reference_module.QwenImageRMS_norm(6, images=False).to(dtype)
    gamma = 1 + latents(6, 1, 1, 1, dtype=dtype)
    ours.gamma.data, theirs.gamma.data = gamma, gamma
    # From overflow of the sum of squares in float16 down to zero, past the smallest norm that is divided by.
    x = latents(2, 6, 3, 4, 5) * torch.tensor([1e3, 1.0, 1e-5, 1e-13, 0.0], dtype=torch.float64)
    x = x.to(dtype)
    assert torch.equal(ours(x), theirs(x))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x[:, :, 0]), theirs(x)[:, :, 0], rtol=4 * eps, atol=eps)
    assert torch.count_nonzero(ours(x)[..., 4]) == 0
    assert ours(x)[..., 0].abs().max() > 1


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5])
def test_gradients(frames):
    ours, theirs = pair()
    x, weight = pixels(2, 3, frames, 16, 24), latents(2, 3, frames, 16, 24)
    actual, expected = gradients(ours, x, weight), gradients(theirs, x, weight)
    for name, grad in expected.items():
        if grad is None:
            assert frames == 1 and "time_conv" in name
            assert actual[name] is None, name
            continue
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-9 * grad.abs().max().item(), msg=name)
        if frames == 1 and grad.ndim == 5 and name != "x":
            assert torch.count_nonzero(actual[name][:, :, :-1]) == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_gradients(dtype):
    """The rule over all gradients together, each relative to its largest element: some have a handful of elements."""
    ours, theirs = pair(dtype)
    ours.set_convolution("exact")
    exact = without_float32_upsample(copy.deepcopy(theirs).double())
    x, weight = pixels(1, 3, 1, 16, 24, dtype=dtype), latents(1, 3, 1, 16, 24, dtype=dtype)
    mine, reference = gradients(ours, x, weight), gradients(theirs, x, weight)
    wanted = {name: g for name, g in gradients(exact, x.double(), weight.double()).items() if g is not None}

    def pool(grads):
        return torch.cat([(grads[name].double() / g.abs().max()).flatten() for name, g in wanted.items()])

    assert_error_at_most_twice(pool(mine), pool(reference), pool(wanted))


# --- modules are called, not bypassed -----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5])
def test_hooks_on_every_convolution_run(frames):
    ours, _ = pair()
    called = set()
    for name, module in ours.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    ours(pixels(1, 3, frames, 8, 8))
    skipped = {name for name, m in ours.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))} - called
    assert all(frames == 1 and "time_conv" in name for name in skipped)
    assert len(called) > 40


def test_dropout_acts_in_training_only():
    ours, _ = pair(dropout=0.5)
    x = pixels(1, 3, 1, 8, 8)
    assert torch.equal(ours.encode(x)[0].mean, ours.encode(x)[0].mean)
    ours.train()
    assert not torch.equal(ours.encode(x)[0].mean, ours.encode(x)[0].mean)


# --- results ------------------------------------------------------------------------------------------------------


def test_outputs_without_return_dict_are_tuples():
    ours, _ = build()
    x = pixels(1, 3, 1, 8, 8)
    (latent_dist,) = encoded = ours.encode(x, return_dict=False)
    assert type(encoded) is tuple
    (sample,) = decoded = ours.decode(latent_dist.mode(), return_dict=False)
    assert type(decoded) is tuple
    assert torch.equal(sample, ours(x).sample)
    assert torch.equal(sample, ours(x, return_dict=False)[0])
    assert torch.equal(sample, ours.decode(latent_dist.mode())[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distribution(dtype):
    parameters = 30 * latents(2, 8, 1, 3, 5, dtype=dtype)
    ours, theirs = DiagonalGaussianDistribution(parameters), reference_gaussian(parameters)
    assert theirs.logvar.min() == -30 and theirs.logvar.max() == 20
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.mode(), theirs.mode())

    def seeds(*numbers):
        return [torch.Generator().manual_seed(n) for n in numbers]

    for numbers in ((1,), (1, 2)):
        assert torch.equal(ours.sample(seeds(*numbers)), theirs.sample(seeds(*numbers)))
    assert torch.equal(ours.sample(*seeds(1)), theirs.sample(*seeds(1)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        mine = ours.sample()
        torch.manual_seed(5)
        assert torch.equal(mine, theirs.sample())


def test_kl():
    """diffusers sums over three axes, which leaves the width of 5-D latents; ours leaves the batch only."""
    first, second = latents(2, 8, 1, 3, 5), latents(2, 8, 1, 3, 5, seed=4)
    ours, theirs = DiagonalGaussianDistribution(first), reference_gaussian(first)
    close(ours.kl(), theirs.kl().sum(-1))
    close(ours.kl(DiagonalGaussianDistribution(second)), theirs.kl(reference_gaussian(second)).sum(-1))
    normal = torch.distributions.Normal(ours.mean, ours.std)
    standard = torch.distributions.Normal(torch.zeros_like(ours.mean), torch.ones_like(ours.mean))
    close(ours.kl(), torch.distributions.kl_divergence(normal, standard).sum((1, 2, 3, 4)))


def test_an_empty_batch_gives_an_empty_result():
    ours, _ = build()
    assert ours.encode(torch.zeros(0, 3, 1, 16, 24).double()).latent_dist.mean.shape == (0, 4, 1, 2, 3)
    assert ours.decode(torch.zeros(0, 4, 1, 2, 3).double()).sample.shape == (0, 3, 1, 16, 24)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, argument, message",
    [
        ("encode", torch.zeros(1, 3, 8, 8),
         "x must have 5 dimensions [B, C, T, H, W], got 4: give one image its frame axis with x.unsqueeze(2)"),
        ("encode", torch.zeros(3, 8, 8), "x must have 5 dimensions [B, C, T, H, W], got 3"),
        ("encode", torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8),
         "x must have a floating-point dtype, got torch.uint8: convert pixels to floats in [-1, 1]"),
        ("encode", torch.zeros(1, 4, 1, 8, 8), "x must have 3 channels, got 4"),
        ("encode", torch.zeros(1, 3, 1, 20, 8),
         "x must have a height and width that are multiples of 8, got 20 and 8"),
        ("encode", torch.zeros(1, 3, 1, 8, 12), "x must have a height and width that are multiples of 8, got 8 and 12"),
        ("encode", torch.zeros(1, 3, 4, 8, 8), "x must have 1 + 4k frames, got 4"),
        ("encode", torch.zeros(1, 3, 0, 8, 8), "x must have 1 + 4k frames, got 0"),
        ("decode", torch.zeros(1, 4, 8, 8),
         "z must have 5 dimensions [B, C, T, H, W], got 4: give one image its frame axis with z.unsqueeze(2)"),
        ("decode", torch.zeros(1, 4, 1, 8, 8, dtype=torch.int64),
         "z must have a floating-point dtype, got torch.int64"),
        ("decode", torch.zeros(1, 16, 1, 8, 8), "z must have 4 channels, got 16"),
        ("decode", torch.zeros(1, 4, 0, 8, 8), "z must have at least one frame, got 0"),
    ],
)  # fmt: skip
def test_bad_inputs(method, argument, message):
    ours, _ = build()
    with pytest.raises(ValueError, match=f"^{re.escape(f'AutoencoderKLQwenImage.{method}: {message}')}$"):
        getattr(ours, method)(argument)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tile_sample_min_height": 100}, "tile_sample_min_height must be a positive multiple of 8, got 100"),
        ({"tile_sample_stride_width": 0}, "tile_sample_stride_width must be a positive multiple of 8, got 0"),
        ({"tile_sample_min_width": -8}, "tile_sample_min_width must be a positive multiple of 8, got -8"),
        ({"tile_sample_min_height": 128},
         "tile_sample_stride_height must be at most tile_sample_min_height (128), got 192"),
        ({"tile_sample_stride_width": 264},
         "tile_sample_stride_width must be at most tile_sample_min_width (256), got 264"),
    ],
)  # fmt: skip
def test_bad_tiles(arguments, message):
    ours, _ = pair()
    with pytest.raises(ValueError, match=f"^{re.escape(f'AutoencoderKLQwenImage.enable_tiling: {message}')}$"):
        ours.enable_tiling(**arguments)
    assert not ours.use_tiling
    assert ours.tile_sample_min_height == ours.tile_sample_min_width == 256


def test_bad_configuration():
    with pytest.raises(ValueError, match=r"temperal_downsample must have one entry per downsampling \(3 for 4"):
        AutoencoderKLQwenImage(**TINY, temperal_downsample=[True])


def test_bad_generators():
    distribution = DiagonalGaussianDistribution(latents(3, 8, 1, 2, 2))
    with pytest.raises(ValueError, match=r"generator must have one entry per sample \(3\), got 2"):
        distribution.sample([torch.Generator(), torch.Generator()])
