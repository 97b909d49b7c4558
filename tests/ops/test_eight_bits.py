"""Float8 in the place of 8-bit integers: the formula, what it costs, and when a GPU gets it."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen_image_fast.ops import Int8Weight, _eight_bits, _int8, _library, eight_bits, int8_rows, linear_int8, reference
from qwen_image_fast.ops.int8_rows import int8_rows_reference

op = importlib.import_module("qwen_image_fast.ops.linear_int8")


def hadamard(group):
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double() / 2
    h = torch.ones(1, 1).double()
    while len(h) < group:
        h = torch.kron(h, h4)
    return h


def drawn(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("group", [1, 16, 256])
def test_rows(group, gelu):
    """Of the formula in float64: scale = max |r| / 448, each value within half a step of e4m3."""
    x = drawn(7, 256)
    values, scales = int8_rows(x, group, gelu, float8=True)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
    exact = (exact.view(7, -1, group) @ hadamard(group)).view(7, 256)
    torch.testing.assert_close(scales.double(), exact.abs().amax(1) / 448, rtol=1e-6, atol=0)
    assert values.dtype == torch.float8_e4m3fn and values.shape == (7, 256) and values.float().abs().amax() == 448
    step = torch.exp2((exact / scales[:, None]).abs().clamp_min(2**-6).log2().floor() - 3) * scales[:, None]
    assert ((values.double() * scales[:, None] - exact).abs() <= 0.5001 * step).all()
    with reference():
        for ours, theirs in zip((values, scales), int8_rows(x, group, gelu, float8=True), strict=True):
            assert torch.equal(ours.float(), theirs.float())


def test_a_width_that_is_filled_up():
    values, scales = int8_rows(drawn(3, 80), 16, float8=True)
    assert values.shape == (3, 128) and (values[:, 80:].float() == 0).all() and scales.shape == (3,)
    empty = int8_rows(torch.empty(0, 80), 16, float8=True)
    assert empty[0].shape == (0, 128) and empty[1].shape == (0,)


def weight_of(columns, depth, seed=1):
    values, scales = int8_rows(drawn(columns, depth, seed), 1)
    return Int8Weight.of(_int8.from_tiles(values, columns, depth), scales, 1)


def test_weights():
    """The integers times their scale, rounded once more: of codes of 7 digits 4 are left."""
    integers, exact = weight_of(9, 80), drawn(9, 80, 1)
    found = integers.in_float8()
    assert found.float8 and found.packed.shape == (9, 128) and (found.sums == 0).all()
    assert found.laid_out() is found and found.values().shape == (9, 80)
    dequantised = integers.values().float() * integers.scales[:, None]
    torch.testing.assert_close(found.scales, dequantised.abs().amax(1) / 448, rtol=1e-6, atol=0)
    mine = found.values().float() * found.scales[:, None]
    assert ((mine - dequantised).abs() <= dequantised.abs() / 15.9 + found.scales[:, None] * 2**-10).all()
    assert 2 < (mine - exact).norm() / (dequantised - exact).norm() < 5  # why integers are the default


def test_products_on_a_cpu():
    """By the formula, with gate and residual, beside a product of integers."""
    x, weight, bias = drawn(20, 80), weight_of(9, 80), drawn(1, 9)[0]
    taken = [int8_rows(x, 1, float8=kind) for kind in (True, False)]
    weights = [weight.in_float8(), weight]
    exact = x @ (weight.values().float() * weight.scales[:, None]).T + bias
    residual, gate = drawn(20, 9, 3), drawn(2, 9, 4)
    for more in ((), ([residual] * 2, [gate] * 2, [None] * 2)):
        found = linear_int8(taken, weights, [bias] * 2, torch.float32, *more)
        expected = residual + gate.repeat_interleave(10, 0) * exact if more else exact
        errors = [((y - expected).norm() / expected.norm()).item() for y in found]
        assert errors[1] < 0.02 < errors[0] * 2 < 0.2, errors


def test_what_torch_sees():
    """Shapes and types of fake tensors, and of a compiled call."""
    x, weight = drawn(20, 80), weight_of(9, 80).in_float8()
    torch.library.opcheck(torch.ops.qwen_image_fast.int8_rows.default, (x, 16, True, True), test_utils="test_schema")
    with FlopCounterMode(display=False):  # a mode that looks on: the registered operators
        (y,) = linear_int8([int8_rows(x, 1, float8=True)], [weight], [None], torch.float32)
    assert torch.equal(y, linear_int8([int8_rows_reference(x, 1, float8=True)], [weight], [None], torch.float32)[0])


def test_what_does_not_fit():
    rows, weight = int8_rows(drawn(4, 64), 64, float8=True), weight_of(9, 64)
    with pytest.raises(ValueError, match="rows must be the uint8 tiles of 4 rows .* got torch.float8_e4m3fn"):
        linear_int8([rows], [weight], [None], torch.float32)
    with pytest.raises(ValueError, match="rows must be the float8_e4m3fn tiles of 4 rows"):
        linear_int8([int8_rows(drawn(4, 64), 64)], [weight.in_float8()], [None], torch.float32)


CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes a GPU of some capability the current one, for `numbers_on`."""
    monkeypatch.setattr(_library, "_has_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return lambda capability: monkeypatch.setattr(_eight_bits, "capability_of", lambda index: capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_a_gpu_gets(capability, gpu):
    gpu(capability)
    cuda = torch.device("cuda")
    assert _eight_bits.numbers_on(cuda) == ("float8" if capability == (10, 3) else "int8")
    with eight_bits("int8"):
        assert _eight_bits.numbers_on(cuda) == "int8"
    with eight_bits("float8"):
        assert _eight_bits.numbers_on(torch.device("cpu")) == "int8"
        if capability >= (8, 9):
            assert _eight_bits.numbers_on(cuda) == "float8"
        else:
            name = "sm_{}{}".format(*capability)
            with pytest.raises(
                ValueError, match=f"eight_bits: choice must be best or int8 on {name}: .* 8.9 or newer, got 'float8'"
            ):
                _eight_bits.numbers_on(cuda)


def test_a_build_without_kernels(gpu, monkeypatch):
    gpu((10, 3))
    monkeypatch.setattr(_library, "_has_cuda", False)
    assert _eight_bits.numbers_on(torch.device("cuda")) == "int8"
    with eight_bits("float8"), pytest.raises(ValueError, match="best or int8 in a build without CUDA kernels"):
        _eight_bits.numbers_on(torch.device("cuda"))


def test_a_choice_that_is_none():
    with pytest.raises(ValueError, match="eight_bits: choice must be one of best, int8, float8, got 'fp8'"):
        eight_bits("fp8")


def test_when_weights_are_laid_out(monkeypatch):
    """Integers come to such a GPU as float8; those in 4 bits, and what is in float8, stay as they are."""
    monkeypatch.setattr(_int8, "on_gpu", lambda x: True)
    monkeypatch.setattr(_eight_bits, "numbers_on", lambda device: "float8")
    assert weight_of(9, 64).float8 and not Int8Weight.of_floats(drawn(9, 64), 1).laid_out().float8
    monkeypatch.setattr(_eight_bits, "numbers_on", lambda device: "int8")
    assert weight_of(9, 64).packed.dtype == torch.int8


def test_the_launches(monkeypatch):
    """Products in float8 go to their kernel, whatever else is in the call, on Hopper too."""
    found = []
    monkeypatch.setattr(_library, "on_cuda", lambda x: True)
    monkeypatch.setattr(_library, "launch", lambda name, on, products, *rest: found.append((name, len(products))))
    monkeypatch.setattr(op, "WGMMA", True)
    monkeypatch.setattr(_eight_bits, "capability_of", lambda device: (9, 0))
    integers = Int8Weight.of(torch.zeros(8, 64, dtype=torch.int8), torch.ones(1), 1)
    float8 = integers.in_float8()
    rows = [(torch.zeros(300, 64, dtype=torch.uint8).view(w.packed.dtype if w.float8 else torch.uint8), torch.ones(300))
            for w in (integers, float8)]  # fmt: skip
    linear_int8([rows[1]] * 2 + [rows[0]], [float8] * 2 + [integers], [None] * 3, torch.bfloat16)
    assert found == [("linear_int8_sm90", 1), ("linear_fp8", 2)]
    with op.int8_kernels("wgmma"), pytest.raises(ValueError, match="weight must be in 8 bits, .* got float8, 8"):
        linear_int8([rows[1]], [float8], [None], torch.bfloat16)
