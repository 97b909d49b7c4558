"""The FP8 output of the norm ops: the row quantisation of their own result, in every bit, on every device."""

import harness
import pytest
import torch
from harness import DTYPES
from test_gate_residual_norm_modulate import OP as GATED
from test_layer_norm_modulate import OP as NORM

from qwen_image_fast import reference
from qwen_image_fast.ops.fp8_rows import fp8_rows

OPS = {"layer_norm_modulate": NORM, "gate_residual_norm_modulate": GATED}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def same(a, b):
    return torch.equal(a.view(torch.uint8) if a.dtype == torch.float8_e4m3fn else a,
                       b.view(torch.uint8) if b.dtype == torch.float8_e4m3fn else b)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 3), (10, 64, 2), (5, 1200, 1), (5, 3080, 2)], ids=str)
def test_the_results_and_their_fp8_rows(op, shape, dtype, device):
    args = op.inputs(dtype, *shape, "packed")
    plain = harness.results(op.fn, args)
    *outs, values, scales = op.fn(*args, fp8=True)
    assert all(torch.equal(a, b) for a, b in zip(outs, plain))
    expected, expected_scales = fp8_rows(outs[-1])
    assert torch.equal(scales, expected_scales) and same(values, expected)


def test_every_exponent_and_tie(device):
    """Through the kernel: a shift without scale gives rows of chosen values, tails of the format among them."""
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    shift = torch.cat([codes, between, between * 1.0001, between * 0.9999, -codes[1:], -between])[None]
    zero = torch.zeros_like(shift)
    out, values, scales = NORM.fn(zero.clone(), shift, zero, fp8=True)
    assert torch.equal(out, shift) and scales.tolist() == [1.0]
    assert same(values, shift.to(torch.float8_e4m3fn))


def test_rows_of_zeros_and_nan(device):
    shift = torch.zeros(2, 40)
    shift[1, 3] = float("nan")
    _, values, scales = NORM.fn(torch.zeros(2, 40), shift, torch.zeros(2, 40), fp8=True)
    assert (values[0].float() == 0).all() and scales[0] == 2.0**-100 / 448 and values[1, 3].float().isnan()


def test_error_of_the_format():
    x = torch.randn(50, 96) * torch.logspace(-3, 3, 50)[:, None]
    values, scales = fp8_rows(x)
    error = (values.float() * scales[:, None] - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scales[:, None] * 2**-10) * 1.0001).all()
    assert fp8_rows(torch.empty(0, 8))[0].shape == (0, 8)


def test_reference_and_registered_op(op):
    args = op.inputs(torch.float32, 6, 24, 2, "packed")
    with reference():
        theirs = op.fn(*args, fp8=True)
    ours = op.fn(*args, fp8=True)
    torch.testing.assert_close([t.float() for t in ours[:-2]], [t.float() for t in theirs[:-2]])
    compiled = torch.compile(op.fn, fullgraph=True, backend="aot_eager")
    assert all(same(a, b) for a, b in zip(compiled(*args, fp8=True), ours))
    name = "layer_norm_modulate" if op is NORM else "gate_residual_norm_modulate"
    registered = getattr(torch.ops.qwen_image_fast, f"{name}_fp8").default
    torch.library.opcheck(registered, (*args, 1e-6), test_utils=("test_schema", "test_faketensor"))


def test_errors(op):
    args = op.inputs(torch.float32, 6, 24, 2, grad=True)
    with pytest.raises(ValueError, match="fp8 must be False where gradients are wanted"):
        op.fn(*args, fp8=True)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16 with fp8=True"):
        op.fn(*op.inputs(torch.float64, 6, 24, 2), fp8=True)
