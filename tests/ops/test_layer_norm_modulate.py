import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_reference


def make(rows, width, segments, layout="equal"):
    x = torch.randn(rows, width) * 2 + 0.5
    offsets = None
    if layout == "packed":
        cuts = sorted(torch.randint(0, rows + 1, (segments - 1,)).tolist())
        offsets = torch.tensor([0, *cuts, rows], dtype=torch.int32)
    vectors = torch.randn(segments, 2, width)
    return x, vectors[:, 0], vectors[:, 1] * 0.5, offsets


OP = Op(layer_norm_modulate, layer_norm_modulate_reference, make)
SHAPES = [(1, 1, 1), (3, 7, 3), (10, 33, 2), (64, 192, 4), (130, 100, 1), (70, 3072, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["equal", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, layout, dtype, kernels):
    harness.check_accuracy(OP, dtype, *shape, layout)


def test_large_mean_does_not_cancel(device):
    """E[x^2] - mean^2 would lose everything here."""
    x = 1000 + torch.randn(4, 3072)
    zero = torch.zeros(1, 3072)
    exact = layer_norm_modulate_reference(x.double(), zero.double(), zero.double())
    assert (layer_norm_modulate(x, zero, zero) - exact).abs().max() < 2e-3


def test_gradcheck():
    harness.check_gradcheck(OP, 5, 9, 3, "packed")
    harness.check_gradcheck(OP, 6, 16, 2, "equal")


def test_opcheck():
    harness.check_opcheck(
        torch.ops.qwen_image_fast.layer_norm_modulate, [*OP.inputs(torch.float32, 6, 24, 2, grad=True), 1e-6]
    )


def test_compile():
    harness.check_compile(OP, (6, 24, 2), (8, 24, 2), (8, 40, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3080, 1200])
def test_rows_of_other_widths(width, dtype, device):
    """Wider than a warp or a block keeps in registers, and between the widths that kernels are made for."""
    harness.check_accuracy(OP, dtype, 5, width, 2, "packed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_tensors(dtype, device):
    harness.check_misaligned(OP, dtype, 6, 64, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    harness.check_deterministic(OP, dtype, 300, 257, 3, "packed")


def test_a_sample_does_not_depend_on_its_neighbours(device):
    x, shift, scale, offsets = OP.inputs(torch.bfloat16, 200, 192, 3, "packed", grad=True)
    whole = layer_norm_modulate(x, shift, scale, offsets)
    grads = torch.autograd.grad(whole, (x, shift, scale), torch.ones_like(whole))
    for s in range(3):
        rows = slice(offsets[s], offsets[s + 1])
        part = layer_norm_modulate(x[rows], shift[s : s + 1], scale[s : s + 1])
        alone = torch.autograd.grad(part, (x, shift, scale), torch.ones_like(part))
        assert torch.equal(part, whole[rows])
        assert torch.equal(grads[0][rows], alone[0][rows])
        assert torch.equal(grads[1][s], alone[1][s]) and torch.equal(grads[2][s], alone[2][s])


def test_leading_dimensions_and_expanded_vectors(device):
    x, vector = torch.randn(2, 5, 32), torch.randn(1, 64)
    shift, scale = vector.expand(2, 64).chunk(2, dim=1)
    out = layer_norm_modulate(x, shift, scale)
    assert out.shape == x.shape
    torch.testing.assert_close(out, layer_norm_modulate_reference(x, shift, scale))


def test_empty(device):
    vectors = torch.randn(2, 8)
    assert layer_norm_modulate(torch.empty(0, 8), vectors, vectors).shape == (0, 8)
    x = torch.empty(0, 8, requires_grad=True)
    shift = torch.randn(2, 8, requires_grad=True)
    layer_norm_modulate(x, shift, shift).sum().backward()
    assert torch.equal(shift.grad, torch.zeros(2, 8))
    out = layer_norm_modulate(torch.randn(3, 8), vectors, vectors, torch.tensor([0, 0, 3], dtype=torch.int32))
    assert out.isfinite().all()


def test_nan_in_nan_out(device):
    x = torch.randn(4, 40)
    x[1, 3] = float("nan")
    zero = torch.zeros(1, 40)
    out = layer_norm_modulate(x, zero, zero)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()


X, V = torch.randn(4, 8), torch.randn(2, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X.t(), V, V), ValueError, "x must be contiguous"),
        ((X.int(), V, V), TypeError, "dtype must be float32"),
        ((X, V.half(), V), TypeError, "shift must have the dtype of the first input"),
        ((X, V, V[:, :4]), ValueError, "scale must have the width of x, 8, got"),
        ((X, V, V[:1]), ValueError, "scale must have 2 segments like the others, got 1"),
        ((X, V[0], V[0]), ValueError, "shift must have two dimensions"),
        ((X[:3], V, V), ValueError, "rows must be a multiple of the 2 segments, got 3"),
        ((X, V, V, torch.tensor([0, 2])), ValueError, "offsets must be int32"),
        ((X, V, V, torch.tensor([0, 4], dtype=torch.int32)), ValueError, "offsets must have segments"),
        ((X, V, V, torch.tensor([0, 5, 4], dtype=torch.int32)), ValueError, "offsets must rise from 0"),
        ((X, V, torch.randn(8, 2).t()), ValueError, "scale must be contiguous in its last dimension"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^layer_norm_modulate: {text}"):
        layer_norm_modulate(*args)


def test_reference_switch():
    import qwen_image_fast.ops as ops

    args = OP.inputs(torch.float32, 6, 24, 2)
    with ops.reference():
        assert torch.equal(layer_norm_modulate(*args), layer_norm_modulate_reference(*args))
