import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast.ops.guided_step import guided_step, guided_step_reference


def make(rows, channels, segments, guided=True, rescale=True):
    sample, cond, uncond = torch.randn(3, rows, channels).unbind(0)
    uncond = 0.7 * cond + 0.5 * uncond
    dt = -torch.rand(segments) * 0.1 - 0.02
    return sample, cond, uncond if guided else None, dt, 4.0, rescale


OP = Op(guided_step, guided_step_reference, make, fixed={3})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guided", [(True, True), (True, False), (False, True)], ids=["rescale", "plain", "no-cfg"])
@pytest.mark.parametrize("shape", [(2, 4, 1), (6, 7, 3), (96, 64, 2), (600, 64, 1)], ids=str)
def test_accuracy(shape, guided, dtype, kernels):
    harness.check_accuracy(OP, dtype, *shape, *guided)


def test_gradcheck():
    harness.check_gradcheck(OP, 4, 9, 2, True, True)
    harness.check_gradcheck(OP, 4, 9, 2, True, False)
    harness.check_gradcheck(OP, 4, 9, 2, False)


def test_opcheck():
    args = [*OP.inputs(torch.float32, 6, 24, 2, True, grad=True), None]
    harness.check_opcheck(torch.ops.qwen_image_fast.guided_step, args)


def test_compile():
    harness.check_compile(OP, (6, 24, 2), (8, 24, 2), (8, 40, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    harness.check_deterministic(OP, dtype, 900, 64, 3)


def test_packed_samples_step_by_their_own_dt(device):
    sample, cond, uncond = torch.randn(3, 10, 64).unbind(0)
    dt, offsets = torch.tensor([-0.5, -0.1]), torch.tensor([0, 4, 10], dtype=torch.int32)
    out = guided_step(sample, cond, uncond, dt, 4.0, True, offsets)
    assert torch.equal(out[:4], guided_step(sample[:4], cond[:4], uncond[:4], dt[:1], 4.0))
    assert torch.equal(out[4:], guided_step(sample[4:], cond[4:], uncond[4:], dt[1:], 4.0))


def test_zero_velocity_stays_zero():
    sample, cond = torch.randn(2, 8), torch.ones(2, 8)
    uncond = cond * 4 / 3
    out = guided_step(sample, cond, uncond, torch.tensor([-0.1]), 4.0)
    assert out.isfinite().all()
    torch.testing.assert_close(out, guided_step_reference(sample, cond, uncond, torch.tensor([-0.1]), 4.0))
    zero = torch.zeros(2, 8)
    assert torch.equal(guided_step(sample, zero, zero, torch.tensor([-0.1]), 4.0), sample)


def test_empty(device):
    x = torch.empty(0, 64)
    assert guided_step(x, x, x, torch.tensor([-0.1]), 4.0).shape == (0, 64)


X, DT = torch.randn(4, 8), torch.tensor([-0.1])


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X, X[:2], X, DT), ValueError, r"cond must have the shape of sample, \(4, 8\), got \(2, 8\)"),
        ((X, X, X.half(), DT), TypeError, "uncond must have the dtype of the first input"),
        ((X, X, X, DT.double()), ValueError, "dt must be float32"),
        ((X, X, X, DT[0]), ValueError, "dt must be one contiguous row"),
        ((X[:, ::2], X[:, ::2], None, DT), ValueError, "sample must be contiguous"),
        ((X, X, X, DT.expand(3).contiguous()), ValueError, "rows must be a multiple of the 3 segments"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^guided_step: {text}"):
        guided_step(*args)
