import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast.ops.gelu_tanh import gelu_tanh, gelu_tanh_reference


def make(rows, width):
    return (torch.randn(rows, width) * 3,)


OP = Op(gelu_tanh, gelu_tanh_reference, make)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 768), (130, 101)], ids=str)
def test_accuracy(shape, dtype, kernels):
    harness.check_accuracy(OP, dtype, *shape)


def test_tails_and_extremes(kernels):
    """Where 1 + tanh(u) cancels, and beyond the range of the exponential."""
    x = torch.tensor([-1e30, -30.0, -9.0, -6.0, -1e-20, 0.0, 1e-20, 6.0, 30.0, 1e30, float("inf"), float("nan")])
    out = gelu_tanh(x)
    exact = gelu_tanh_reference(x.double())
    assert out[-1].isnan() and out[-2] == float("inf")
    torch.testing.assert_close(out[3:-2].double(), exact[3:-2], rtol=2e-6, atol=0)
    assert (out[:3].abs() < 1e-7).all()
    grid = torch.linspace(-5, 5, 4001)
    torch.testing.assert_close(gelu_tanh(grid).double(), gelu_tanh_reference(grid.double()), rtol=2e-6, atol=1e-12)


def test_inplace(device):
    x = torch.randn(5, 33)
    expected = gelu_tanh(x)
    assert gelu_tanh(x, inplace=True) is x and torch.equal(x, expected)
    x = torch.randn(5, 33, requires_grad=True)
    before = x.detach().clone()
    gelu_tanh(x, inplace=True).sum().backward()
    assert torch.equal(x.detach(), before) and x.grad is not None


def test_an_element_does_not_depend_on_where_it_lies(kernels):
    x = torch.randn(100)
    whole = gelu_tanh(x)
    assert all(torch.equal(gelu_tanh(x[i : i + n]), whole[i : i + n]) for i, n in ((0, 1), (3, 5), (8, 92), (50, 17)))


def test_gradcheck():
    harness.check_gradcheck(OP, 3, 9)


def test_opcheck():
    harness.check_opcheck(torch.ops.qwen_image_fast.gelu_tanh, OP.inputs(torch.float32, 6, 24, grad=True))


def test_compile():
    harness.check_compile(OP, (6, 24), (8, 24), (8, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    harness.check_deterministic(OP, dtype, 300, 257)


def test_empty(device):
    assert gelu_tanh(torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [(torch.randn(4, 8).t(), ValueError, "x must be contiguous"), (torch.ones(3).int(), TypeError, "dtype must be")],
)
def test_errors(x, error, text):
    with pytest.raises(error, match=f"^gelu_tanh: {text}"):
        gelu_tanh(x)
