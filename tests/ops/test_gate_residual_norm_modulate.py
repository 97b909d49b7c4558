import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast.ops.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_reference,
)


def make(rows, width, segments, layout="equal"):
    x, y = torch.randn(rows, width) * 2 + 0.5, torch.randn(rows, width)
    offsets = None
    if layout == "packed":
        cuts = sorted(torch.randint(0, rows + 1, (segments - 1,)).tolist())
        offsets = torch.tensor([0, *cuts, rows], dtype=torch.int32)
    gate, shift, scale = (torch.randn(segments, 3, width) * 0.7).unbind(1)
    return x, y, gate, shift, scale, offsets


OP = Op(gate_residual_norm_modulate, gate_residual_norm_modulate_reference, make)
SHAPES = [(1, 2, 1), (3, 7, 3), (10, 33, 2), (64, 192, 4), (130, 100, 1), (70, 3072, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["equal", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, layout, dtype, kernels):
    harness.check_accuracy(OP, dtype, *shape, layout)


def test_gradcheck():
    harness.check_gradcheck(OP, 5, 9, 3, "packed")
    harness.check_gradcheck(OP, 6, 16, 2, "equal")


def test_gradient_through_one_output_only():
    args = OP.inputs(torch.float64, 6, 16, 2, grad=True)
    for pick in (0, 1):
        seed = torch.randn(6, 16, dtype=torch.float64)
        inputs = args[:3] if pick == 0 else args[:5]
        ours = torch.autograd.grad(OP.fn(*args)[pick], inputs, seed)
        for a, b in zip(ours, torch.autograd.grad(OP.reference(*args)[pick], inputs, seed)):
            torch.testing.assert_close(a, b)


def test_opcheck():
    args = [*OP.inputs(torch.float32, 6, 24, 2, grad=True), 1e-6]
    harness.check_opcheck(torch.ops.qwen_image_fast.gate_residual_norm_modulate, args)


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
    x, y, gate, shift, scale, offsets = OP.inputs(torch.bfloat16, 200, 192, 3, "packed", grad=True)
    inputs = (x, y, gate, shift, scale)
    whole = gate_residual_norm_modulate(*inputs, offsets)
    grads = torch.autograd.grad(whole, inputs, [torch.ones_like(t) for t in whole])
    for s in range(3):
        rows, own = slice(offsets[s], offsets[s + 1]), slice(s, s + 1)
        part = gate_residual_norm_modulate(x[rows], y[rows], gate[own], shift[own], scale[own])
        alone = torch.autograd.grad(part, inputs, [torch.ones_like(t) for t in part])
        assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows])
        for g, a, place in zip(grads, alone, (rows, rows, own, own, own)):
            assert torch.equal(g[place], a[place])


def test_float16_saturates_as_the_model_clips(device):
    x = torch.full((1, 8), 60000.0, dtype=torch.float16)
    one = torch.ones(1, 8, dtype=torch.float16)
    residual, out = gate_residual_norm_modulate(x, x * torch.linspace(-2, 1, 8).half(), one, one, one)
    assert residual.abs().max() == 65504 and out.isfinite().all()
    assert torch.equal(
        residual, gate_residual_norm_modulate_reference(x, x * torch.linspace(-2, 1, 8).half(), one, one, one)[0]
    )
    x[0, 0] = float("nan")
    assert gate_residual_norm_modulate(x, x, one, one, one)[0][0, 0].isnan()


def test_empty(device):
    v = torch.randn(2, 8, requires_grad=True)
    x = torch.empty(0, 8, requires_grad=True)
    residual, out = gate_residual_norm_modulate(x, x.detach(), v, v, v)
    assert residual.shape == out.shape == (0, 8)
    (residual.sum() + out.sum()).backward()
    assert torch.equal(v.grad, torch.zeros(2, 8))


X, V = torch.randn(4, 8), torch.randn(2, 8)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X, X[:2], V, V, V), ValueError, r"y must have the shape of x, \(4, 8\), got \(2, 8\)"),
        ((X, X.half(), V, V, V), TypeError, "y must have the dtype of the first input"),
        ((X, X.t().contiguous().t(), V, V, V), ValueError, "y must be contiguous"),
        ((X.t(), X.t(), V, V, V), ValueError, "x must be contiguous"),
        ((X, X, V, V[:1], V), ValueError, "shift must have 2 segments like the others, got 1"),
        ((X, X, V, V, V[:, :3]), ValueError, "scale must have the width of x, 8"),
        ((X, X, V, V, V, torch.tensor([1, 2, 4], dtype=torch.int32)), ValueError, "offsets must rise from 0"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^gate_residual_norm_modulate: {text}"):
        gate_residual_norm_modulate(*args)
