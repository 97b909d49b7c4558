import functools

import harness
import pytest
import torch
from harness import Op

from qwen_image_fast.ops.conv3x3 import conv3x3, conv3x3_reference, pack_conv3x3


def make(batch, height, width, channels, out_channels, upsample=False, norm=True, extras=True):
    scale = 2 if upsample else 1
    x = torch.randn(batch, height, width, channels)
    weight = torch.randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
    bias, residual = torch.randn(out_channels), torch.randn(batch, scale * height, scale * width, out_channels)
    gamma = 1 + 0.3 * torch.randn(channels)
    return x, weight, bias if extras else None, residual if extras else None, gamma if norm else None, upsample


OP = Op(conv3x3, conv3x3_reference, make)
# Of the largest value: a pixel of float32 errs at most so much.
BOUND = 2.5e-6


def errors(args):
    """(ours, the reference's) largest error against float64, relative to the largest value."""
    exact = conv3x3_reference(*harness.upcast(OP, args))
    scale = exact.abs().max()
    return [((fn(*args).double() - exact).abs().max() / scale).item() for fn in (conv3x3, conv3x3_reference)]


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 3, 5, 7, 9), (1, 4, 4, 32, 32), (2, 9, 13, 20, 40), (3, 17, 6, 33, 65), (1, 70, 66, 96, 32)],
    ids=str,
)
def test_float32_within_its_tier(shape, upsample, instruction_set):
    norm_and_extras = (not upsample, shape[0] > 1)
    ours, reference = errors(OP.inputs(torch.float32, *shape, upsample, *norm_and_extras))
    assert ours <= BOUND, (ours, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upsample", [False, True])
def test_accuracy_in_16_bit(dtype, upsample, instruction_set):
    """Computed in float32 and rounded once: the rule of exact operations, forward and backward."""
    harness.check_accuracy(OP, dtype, 2, 9, 6, 40, 36, upsample)


@pytest.mark.parametrize("upsample", [False, True])
def test_gradients_in_float32(upsample, instruction_set):
    args = OP.inputs(torch.float32, 2, 9, 6, 40, 36, upsample, grad=True)
    exact_args = harness.upcast(OP, args)
    seed = [torch.randn(2, *((18, 12) if upsample else (9, 6)), 36)]
    ours = harness.gradients((conv3x3(*args),), OP.differentiable(args), seed)
    exact = harness.gradients((conv3x3_reference(*exact_args),), OP.differentiable(exact_args), seed)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4e-6 * b.abs().max().item())


@pytest.mark.parametrize("upsample, norm", [(False, True), (True, False)])
def test_float64_and_gradcheck(upsample, norm):
    ours, _ = errors(OP.inputs(torch.float64, 2, 9, 13, 20, 40, upsample, norm))
    assert ours < 1e-14
    harness.check_gradcheck(OP, 1, 3, 2, 2, 2, upsample, norm)


def test_the_transform_is_as_accurate_as_documented():
    """A deep sum: the root mean square of the error is at most twice that of a direct convolution."""
    args = OP.inputs(torch.float32, 1, 32, 32, 192, 64, False, False, False)
    exact = conv3x3_reference(*harness.upcast(OP, args))
    ours, direct = ((fn(*args).double() - exact).square().mean().sqrt() / exact.std() for fn in OPS)
    assert ours <= 2 * direct, (ours, direct)


OPS = (conv3x3, conv3x3_reference)


def test_packed_weight():
    for upsample in (False, True):
        args = OP.inputs(torch.float32, 1, 6, 5, 8, 40, upsample)
        packed = pack_conv3x3(args[1], upsample)
        assert packed.shape == (36, 4 if upsample else 1, 2, 8, 32)
        assert torch.equal(conv3x3(*args, packed=packed), conv3x3(*args))
        strided = args[1].permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
        assert torch.equal(conv3x3(args[0], strided, *args[2:]), conv3x3(*args))


def test_a_pixel_does_not_depend_on_the_blocks(instruction_set):
    """The same bits alone, in a batch, and in a part of the image that is cut at a multiple of the tile."""
    x, weight, bias, _, gamma, _ = make(9, 44, 20, 64, 40)
    for upsample in (False, True):
        run = functools.partial(conv3x3, weight=weight, bias=bias, gamma=gamma, upsample=upsample)
        whole, s = run(x), 2 if upsample else 1
        assert torch.equal(run(x[3:4]), whole[3:4])
        assert torch.equal(run(x[:, 8:32].contiguous())[:, s : 23 * s], whole[:, 9 * s : 31 * s])


@pytest.mark.parametrize("upsample", [False, True])
def test_without_padded_rows(upsample):
    x, weight, bias, residual, gamma, _ = make(2, 9, 6, 40, 36, upsample)
    cut = 2 if upsample else 1
    inner = residual[:, cut:-cut].contiguous()
    whole = conv3x3(x, weight, bias, residual, gamma, upsample)
    part = conv3x3(x, weight, bias, inner, gamma, upsample, pad_rows=False)
    torch.testing.assert_close(part, whole[:, cut:-cut], rtol=0, atol=1e-5)
    assert conv3x3(x[:, :2].contiguous(), weight, bias, None, gamma, upsample, pad_rows=False).shape[1] == 0
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 2, 2), (2, 2, 3, 3))]
    assert torch.autograd.gradcheck(lambda x, w: conv3x3(x, w, upsample=upsample, pad_rows=False), args)


@pytest.mark.parametrize("upsample", [False, True])
def test_opcheck(upsample):
    args = OP.inputs(torch.float32, 1, 5, 6, 4, 3, upsample, grad=True)
    harness.check_opcheck(torch.ops.qwen_image_fast.conv3x3, [*args, True, None])


def test_compile():
    harness.check_compile(OP, (1, 5, 6, 4, 3), (2, 8, 7, 4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upsample", [False, True])
def test_deterministic(dtype, upsample):
    """The forward pass and the gradient of x; that of the weight is torch's convolution."""
    x, *rest = OP.inputs(dtype, 2, 21, 18, 48, 40, upsample)
    args = [x.requires_grad_(), *rest]
    harness.check_deterministic(Op(lambda x: conv3x3(x, *rest), None, lambda: (args[0].detach(),)), dtype)


def test_reference_mode():
    from qwen_image_fast import reference

    args = make(1, 5, 6, 4, 3, True)
    with reference():
        out = conv3x3(*args)
    assert torch.equal(out, conv3x3_reference(*args))


@pytest.mark.parametrize("shape", [(0, 4, 4, 8, 8), (1, 0, 4, 8, 8), (1, 4, 4, 8, 0)])
def test_empty(shape):
    out = conv3x3(*make(*shape))
    assert out.shape == (*shape[:3], shape[4])


X, WEIGHT = torch.randn(1, 4, 5, 8), torch.randn(6, 8, 3, 3)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X[0], WEIGHT), ValueError, "x must have four dimensions"),
        ((X.transpose(1, 2), WEIGHT), ValueError, "x must be contiguous"),
        ((X.int(), WEIGHT), TypeError, "dtype must be"),
        ((X, WEIGHT.double()), TypeError, "weight must have the dtype of the first input"),
        ((X, WEIGHT[:, :7]), ValueError, r"weight must have the shape \[out_channels, 8, 3, 3\], got \(6, 7, 3, 3\)"),
        ((X, WEIGHT, torch.ones(5)), ValueError, r"bias must have the shape \(6,\), got \(5,\)"),
        ((X, WEIGHT, None, X), ValueError, r"residual must have the shape \(1, 4, 5, 6\), got"),
        ((X, WEIGHT, None, None, torch.ones(6)), ValueError, r"gamma must have the shape \(8,\), got"),
        ((X, WEIGHT, None, None, torch.ones(16)[::2]), ValueError, "gamma must be contiguous"),
        (
            (X[:, :1], WEIGHT, None, None, None, False, False),
            ValueError,
            "x must have at least 2 rows without pad_rows",
        ),
        ((X, WEIGHT, None, None, None, False, True, torch.ones(3)), ValueError, "packed must be pack_conv3x3"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^conv3x3: {text}"):
        conv3x3(*args)
