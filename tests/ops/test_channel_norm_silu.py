import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast.ops.channel_norm_silu import (
    add_channel_norm_silu,
    channel_norm_silu,
    channel_norm_silu_reference,
)


def make(rows, channels, bias=True, silu=True):
    x = torch.randn(rows, channels) * torch.tensor([1e-3, 1.0, 30.0]).repeat(rows)[:rows, None]
    gamma = 1 + 0.3 * torch.randn(channels)
    return x, gamma, torch.randn(channels) if bias else None, silu


OP = Op(channel_norm_silu, channel_norm_silu_reference, make)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7, False), (64, 96, False), (70, 384, True, False), (130, 101)], ids=str)
def test_accuracy(shape, dtype, kernels):
    harness.check_accuracy(OP, dtype, *shape)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_norms_from_overflow_of_squares_to_zero(dtype, kernels):
    """As F.normalize: squares beyond float16, rows below the smallest norm, rows of zeros and their gradients."""
    if dtype == torch.float64 and kernels.startswith("cuda"):
        pytest.skip("no float64 on CUDA")
    size = torch.tensor([3e3, 1.0, 1e-5, 1e-13, 0.0], dtype=torch.float64)
    x = (torch.randn(5, 40, dtype=torch.float64) * size[:, None]).to(dtype).requires_grad_()
    gamma = torch.ones(40, dtype=dtype)
    out, expected = channel_norm_silu(x, gamma), channel_norm_silu_reference(x, gamma)
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert torch.count_nonzero(out[4]) == 0
    if dtype in (torch.float64, torch.float32):
        (grad,), (wanted,) = (torch.autograd.grad(y[:, ::3].sum(), x) for y in (out, expected))
        scale = wanted.abs().amax(1, keepdim=True)
        torch.testing.assert_close(grad / scale, wanted / scale, rtol=0, atol=1e2 * torch.finfo(dtype).eps)


def test_extremes_of_the_activation(kernels):
    gamma = torch.tensor([-1e30, -200.0, -30.0, 0.0, 30.0, 200.0, 1e30])
    out = channel_norm_silu(torch.ones(1, 7), gamma)[0]
    exact = torch.nn.functional.silu(gamma.double())
    assert (out[:3].abs() < 1e-7).all()
    torch.testing.assert_close(out[3:].double(), exact[3:], rtol=1e-6, atol=0)


def test_inplace_and_leading_dimensions(device):
    x, gamma = torch.randn(2, 3, 4, 24), torch.randn(24)
    expected = channel_norm_silu(x, gamma)
    assert torch.equal(expected.flatten(0, 2), channel_norm_silu(x.flatten(0, 2), gamma))
    assert channel_norm_silu(x, gamma, inplace=True) is x and torch.equal(x, expected)
    before = x.clone().requires_grad_()
    kept = before.detach().clone()
    channel_norm_silu(before, gamma, inplace=True).sum().backward()
    assert torch.equal(before.detach(), kept)


def test_a_row_does_not_depend_on_its_neighbours(kernels):
    x, gamma, bias, silu = make(90, 41)
    whole = channel_norm_silu(x, gamma, bias, silu)
    assert all(torch.equal(channel_norm_silu(x[i:j], gamma, bias), whole[i:j]) for i, j in ((0, 1), (3, 70), (89, 90)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 192), (9, 640), (5, 800), (140, 24), (3, 1)], ids=str)
def test_rows_of_other_widths(shape, dtype, device):
    """Of every number of lanes, wider than registers hold, more than one chunk; a single channel."""
    harness.check_accuracy(OP, dtype, *shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_tensors(dtype, device):
    harness.check_misaligned(OP, dtype, 6, 64)


def test_nan_in_nan_out(device):
    x = torch.randn(4, 40)
    x[1, 3] = float("nan")
    out = channel_norm_silu(x, torch.ones(40))
    assert out[1].isnan().any() and out[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 101, 192, 384, 640, 800])
def test_sums_in_front(channels, dtype, device):
    """The bits of a sum of torch and the norm behind it; with a residual one rounding less. In place or not."""
    x, rest = (torch.randn(2, 9, channels).to(dtype) for _ in range(2))
    added, gamma = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    total, kept = x + added, x.clone()
    assert torch.equal(add_channel_norm_silu(x, added), total)
    assert torch.equal(add_channel_norm_silu(x, added, gamma=gamma), channel_norm_silu(total, gamma))
    summed = add_channel_norm_silu(x, added, rest)
    rounded = 1 if device == "cpu" else 0.5  # times, on the way
    exact = x.double() + added.double() + rest.double()
    largest = torch.stack([x, added.expand_as(x), rest]).double().abs().sum(0)
    assert ((summed.double() - exact).abs() <= rounded * torch.finfo(dtype).eps * largest + 1e-6).all()
    assert torch.equal(add_channel_norm_silu(x, added, rest, gamma), channel_norm_silu(summed, gamma))
    assert torch.equal(x, kept)
    assert torch.equal(add_channel_norm_silu(x, added, rest, gamma, inplace=True), channel_norm_silu(summed, gamma))
    assert device == "cpu" or torch.equal(x, channel_norm_silu(summed, gamma))


def test_sums_in_front_have_gradients(device):
    leaves = [torch.randn(n, 24)[0] if n == 1 else torch.randn(n, 24) for n in (6, 1, 6, 1)]
    leaves = [t.requires_grad_() for t in leaves]
    x, added, rest, gamma = leaves
    ours = torch.autograd.grad(add_channel_norm_silu(x, added, rest, gamma, inplace=True).sum(), leaves)
    theirs = torch.autograd.grad(channel_norm_silu(x + added + rest, gamma).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_errors_of_sums_in_front():
    x, gamma = torch.randn(4, 8), torch.ones(8)
    for args, text in (
        ((x, torch.ones(9)), r"added must have one value per channel of x, 8, got \(9,\)"),
        ((x, gamma, x[:2]), r"residual must be contiguous and have the shape \(4, 8\), got \(2, 8\)"),
        ((x, gamma, None, torch.ones(7)), "gamma must have one value per channel"),
    ):
        with pytest.raises(ValueError, match=f"^add_channel_norm_silu: {text}"):
            add_channel_norm_silu(*args)


@pytest.mark.parametrize("options", [(True, True), (False, False)])
def test_gradcheck(options):
    harness.check_gradcheck(OP, 4, 9, *options)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    args = OP.inputs(torch.float32, 6, 24, bias, grad=True)
    harness.check_opcheck(torch.ops.qwen_image_fast.channel_norm_silu, args)


def test_compile():
    harness.check_compile(OP, (6, 24), (8, 24), (8, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    harness.check_deterministic(OP, dtype, 300, 130)


def test_reference_mode():
    from qwen_image_fast import reference

    x, gamma, bias, _ = make(5, 8)
    with reference():
        out = channel_norm_silu(x, gamma, bias)
    assert torch.equal(out, channel_norm_silu_reference(x, gamma, bias))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape, device):
    x = torch.empty(shape, requires_grad=True)
    gamma = torch.ones(shape[1], requires_grad=True)
    out = channel_norm_silu(x, gamma)
    out.sum().backward()
    assert out.shape == shape and gamma.grad.eq(0).all()


X, GAMMA = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((torch.randn(8, 4).t(), GAMMA), ValueError, "x must be contiguous"),
        ((X.int(), GAMMA), TypeError, "dtype must be"),
        ((X, GAMMA.double()), TypeError, "gamma must have the dtype of the first input, torch.float32"),
        ((X, torch.ones(9)), ValueError, r"gamma must have one value per channel of x, 8, got \(9,\)"),
        ((X, GAMMA, torch.ones(1)), ValueError, r"bias must have one value per channel of x, 8, got \(1,\)"),
        ((X, torch.ones(16)[::2]), ValueError, "gamma must be contiguous"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^channel_norm_silu: {text}"):
        channel_norm_silu(*args)
