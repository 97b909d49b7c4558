"""linear_amx: the op tests, on the tile unit where the CPU has one and by torch's products, and its exceptions."""

import sys

import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast import ops
from qwen_image_fast.models import stream_linear
from qwen_image_fast.ops import linear_amx, linear_kernels
from qwen_image_fast.ops.linear_amx import AVAILABLE, linear_amx_reference

MODULE = sys.modules["qwen_image_fast.ops.linear_amx"]
unit = pytest.mark.skipif(not AVAILABLE, reason="needs a CPU with AMX")


@pytest.fixture(params=[pytest.param("amx", marks=unit), "torch"])
def place(request, monkeypatch):
    """Products of any size on the unit, or torch's."""
    monkeypatch.setattr(MODULE, "SMALLEST", 1)
    with linear_kernels("table" if request.param == "amx" else "torch"):
        yield request.param


@pytest.fixture
def computed(monkeypatch):
    """How many products the unit was given."""
    counts, run = [], MODULE._products
    monkeypatch.setattr(MODULE, "_products", lambda products: counts.append(len(products)) or run(products))
    return counts


def make(*shapes):
    """Products of rows, depth and columns; the second weight is a transposed view."""
    args = []
    for i, (rows, depth, columns) in enumerate(shapes):
        weight = torch.randn(depth, columns).t() if i == 1 else torch.randn(columns, depth)
        args += [torch.randn(rows, depth), weight / max(depth, 1) ** 0.5, torch.randn(columns)]
    return tuple(args)


def by_product(fn):
    def run(*args):
        return tuple(fn(list(args[::3]), list(args[1::3]), list(args[2::3])))

    return run


OP = Op(by_product(linear_amx), by_product(linear_amx_reference), make)
# The smallest; odd sizes around those of a tile; more than one chunk and piece of the depth and of both sides.
SHAPES = [
    ((1, 1, 1),), ((33, 65, 47), (5, 7, 3)), ((31, 32, 33), (64, 96, 16), (17, 31, 64)), ((300, 520, 290),),
    ((40, 4200, 36), (1200, 40, 8)), ((20, 33, 800),),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_accuracy(shapes, dtype, place, computed):
    harness.check_accuracy(OP, dtype, *shapes)
    assert bool(sum(computed)) == (place == "amx" and dtype == torch.float32)


def test_gradcheck(place):
    harness.check_gradcheck(OP, (3, 5, 4), (2, 3, 3))


def test_opcheck(place):
    x, w, b = OP.inputs(torch.float32, (5, 8, 6), grad=True)
    harness.check_opcheck(torch.ops.qwen_image_fast.linear_amx, [[x], [w], [b]])


def test_compile(place):
    harness.check_compile(OP, ((6, 40, 8), (3, 5, 7)), ((9, 48, 8), (4, 6, 7)))


def test_the_same_bits_for_any_number_of_threads(place):
    if place == "torch":
        pytest.skip("torch's products may differ")
    harness.check_deterministic(OP, torch.float32, (300, 600, 290), (70, 33, 65))


@unit
def test_a_row_does_not_depend_on_the_others(place):
    x, w, b = OP.inputs(torch.float32, (600, 700, 300))
    whole = linear_amx([x], [w], [b])[0]
    assert torch.equal(linear_amx([x[100:117]], [w], [b])[0], whole[100:117])
    assert torch.equal(linear_amx([x], [w[40:75]], [b[40:75]])[0], whole[:, 40:75])


def test_strides_and_shared_matrices(place):
    """Whatever the strides; a matrix that several products share is given once."""
    x = torch.randn(50, 2, 40)[:, 0]
    w = torch.randn(30, 40, 2)[..., 1]
    shared = [x, x, torch.randn(40, 50).t()]
    weights = [w, torch.randn(40, 30).t(), w]
    for a, b in zip(linear_amx(shared, weights), linear_amx_reference(shared, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_empty(place):
    x, w, b = torch.randn(0, 8), torch.randn(6, 8), torch.randn(6)
    assert linear_amx([x], [w], [b])[0].shape == (0, 6)
    assert torch.equal(linear_amx([torch.randn(3, 0)], [w[:, :0]], [b])[0], b.expand(3, 6))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38, -3.4e38])
@pytest.mark.parametrize("place_of_it", ["x", "weight"])
def test_numbers_beyond_bfloat16_are_torchs(value, place_of_it, place):
    x, w, b = OP.inputs(torch.float32, (40, 64, 48))
    (x if place_of_it == "x" else w)[7, 11] = value
    torch.testing.assert_close(
        linear_amx([x], [w], [b])[0], torch.nn.functional.linear(x, w, b), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("scale", [(1e-30, 1), (1, 1e-33), (1e-20, 1e-20), (1e-12, 1e-11), (1e15, 1e15), (1e-35, 1e30)])
def test_small_and_large_numbers(scale, place):
    """As exact as torch's products at every scale, in single rows of a matrix too down to 1e-33 of the others."""
    x, w, _ = OP.inputs(torch.float32, (40, 96, 48))
    x, w = x * scale[0], w * scale[1]
    exact, torchs = x.double() @ w.double().t(), x @ w.t()
    harness.assert_twice_the_reference(linear_amx([x], [w])[0], torchs, exact, "result")


@unit
def test_beside_large_numbers_small_ones_keep_their_digits(place):
    x, w, _ = OP.inputs(torch.float32, (40, 96, 48))
    x[::2] *= 1e-25
    exact, torchs = x.double() @ w.double().t(), x @ w.t()
    ours = linear_amx([x], [w])[0]
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        harness.assert_twice_the_reference(ours[rows], torchs[rows], exact[rows], "result")


def test_only_the_gradients_asked_for(place):
    args = OP.inputs(torch.float32, (40, 33, 20), (9, 8, 7))
    args[1].requires_grad_()
    args[3].requires_grad_()
    grads = [torch.autograd.grad(sum(o.sum() for o in fn(*args)), [args[1], args[3]]) for fn in (OP.fn, OP.reference)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": []}, ValueError, "x must hold at least one tensor, got 0"),
        ({"weight": []}, ValueError, "weight must hold 1 tensors like x, got 0"),
        ({"bias": [torch.randn(6)] * 2}, ValueError, "bias must hold 1 tensors like x, got 2"),
        ({"x": [torch.randn(2, 4, 8)]}, ValueError, r"x must have two dimensions, \[rows, depth\], got \(2, 4, 8\)"),
        ({"weight": [torch.randn(6, 7)]}, ValueError, r"weight must have the shape \[columns, 8\], got \(6, 7\)"),
        ({"bias": [torch.randn(5)]}, ValueError, r"bias must have the shape \(6,\), got \(5,\)"),
        ({"weight": [torch.randn(6, 8).half()]}, TypeError, "weight must have the dtype of the first input"),
        ({"x": [torch.ones(4, 8).int()]}, TypeError, "dtype must be float32, float16, bfloat16 or float64"),
    ],
)
def test_errors(change, error, text):
    with pytest.raises(error, match=f"^linear_amx: {text}"):
        linear_amx(**{"x": [torch.randn(4, 8)], "weight": [torch.randn(6, 8)], "bias": [torch.randn(6)], **change})


# ---- what models give it -----------------------------------------------------------------------------------------


@unit
def test_layers_of_a_model_that_are_plain_and_large(computed, monkeypatch):
    monkeypatch.setattr(MODULE, "SMALLEST", 32)
    layers, x = [torch.nn.Linear(48, 40), torch.nn.Linear(48, 64)], [torch.randn(50, 48), torch.randn(8, 48)]
    expected = [layer(t) for layer, t in zip(layers, x)]

    def run():
        computed.clear()
        for a, b in zip(stream_linear.each(layers, x), expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        return computed == [1]  # the second has too few rows

    assert run()
    with linear_kernels("torch"):
        assert not run()
    with ops.reference():
        assert not run()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(AssertionError):
        run()
    hook = layers[0].register_forward_hook(lambda *a: None)
    assert not run()
    hook.remove()
    assert run()
