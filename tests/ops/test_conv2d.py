import math
import re
import sys
from types import SimpleNamespace

import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast import _C
from qwen_image_fast.ops.conv2d import conv2d, conv2d_reference


def make(batch, height, width, channels, out_channels, kernel=(3, 3), padding=(1, 1), extras=True, how="auto"):
    x = torch.randn(batch, height, width, channels)
    weight = torch.randn(out_channels, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5
    size = [n + 2 * p - k + 1 for n, p, k in zip((height, width), padding, kernel)]
    bias, residual = torch.randn(out_channels), torch.randn(batch, *size, out_channels)
    return x, weight, bias if extras else None, residual if extras else None, padding, how


OP = Op(conv2d, conv2d_reference, make)


@pytest.fixture(params=["cpu", "cuda"])
def where(request):
    """Not the emulator: the CUDA kernel is CUTLASS's."""
    if request.param == "cpu":
        yield "torch"
        return
    if not (torch.cuda.is_available() and hasattr(_C, "conv2d_forward_cuda")):
        pytest.skip("needs a GPU and a build with CUDA")
    with torch.device("cuda"):
        yield "cutlass"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 8, 8),
        (2, 9, 13, 16, 40),
        (1, 20, 21, 96, 96),
        (2, 6, 5, 24, 200, (2, 2), (1, 1), False),
        (1, 7, 6, 40, 384, (3, 3), (0, 1)),
        (1, 5, 4, 8, 16, (1, 1), (0, 0)),
    ],
    ids=str,
)
def test_accuracy(shape, dtype, where):
    if where == "cutlass" and dtype == torch.float32:
        where = "torch"
    defaults = ((3, 3), (1, 1), True)
    harness.check_accuracy(OP, dtype, *shape, *defaults[len(shape) - 5 :], where)


def test_gradcheck():
    harness.check_gradcheck(OP, 1, 3, 2, 2, 3)


def test_opcheck():
    args = OP.inputs(torch.float32, 1, 5, 6, 4, 3, grad=True)
    harness.check_opcheck(torch.ops.qwen_image_fast.conv2d, args)


def test_compile():
    harness.check_compile(OP, (1, 5, 6, 4, 3), (2, 8, 7, 4, 3))


@pytest.mark.parametrize("shape", [(0, 4, 4, 8, 8), (1, 4, 4, 8, 0)])
def test_empty(shape):
    assert conv2d(*make(*shape)).shape == (*shape[:3], shape[4])


def test_more_elements_than_the_kernel_counts(monkeypatch):
    """Of what goes in and of what comes out: more channels make a small image's result larger than it."""

    class OnCuda:
        is_cuda, dtype = True, torch.bfloat16

        def __init__(self, *shape):
            self.shape, self.numel, self.data_ptr = shape, lambda: math.prod(shape), lambda: 0

    module = sys.modules[conv2d.__module__]
    monkeypatch.setattr(module, "_C", SimpleNamespace(conv2d_forward_cuda=None))
    weight = SimpleNamespace(shape=(64, 8, 3, 3))
    for height, fault in ((2**12, None), (2**13, "give a result of fewer"), (2**16, "have fewer than 2\\^31 elements")):
        x = OnCuda(1, height, 2**12, 8)
        found = module.obstacle(x, weight, (*x.shape[:3], 64))
        assert (found is None) if fault is None else re.match(fault, found[1])


X, WEIGHT = torch.randn(1, 4, 5, 8), torch.randn(6, 8, 3, 3)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((X[0], WEIGHT), ValueError, "x must have four dimensions"),
        ((X.transpose(1, 2), WEIGHT), ValueError, "x must be contiguous"),
        ((X.int(), WEIGHT), TypeError, "dtype must be"),
        ((X, WEIGHT.double()), TypeError, "weight must have the dtype of the first input"),
        ((X, WEIGHT[:, :7]), ValueError, r"weight must have the shape \[out_channels, 8, height, width\]"),
        ((X, WEIGHT, torch.ones(5)), ValueError, r"bias must have the shape \(6,\), got \(5,\)"),
        ((X, WEIGHT, None, X), ValueError, r"residual must have the shape \(1, 4, 5, 6\), got"),
        ((X[:, :1], WEIGHT, None, None, (0, 0)), ValueError, "x must be at least as large as the weight"),
        ((X, WEIGHT, None, None, (1, 1), "fast"), ValueError, "kernel must be one of auto, torch, cutlass, got 'fast'"),
        ((X, WEIGHT, None, None, (1, 1), "cutlass"), ValueError, "x must be on CUDA, in a build with CUTLASS's"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^conv2d: {text}"):
        conv2d(*args)
