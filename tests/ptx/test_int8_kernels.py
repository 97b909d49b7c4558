"""The 8-bit layers as compiled: the bits of the CPU's kernels, in any order that the interpreter draws."""

import pytest
import torch

from ptx.cases import SEEDS, int8_product
from qwen_image_fast.ops import _int8, int8_rows, linear_int8
from qwen_image_fast.ops.linear_int8 import linear_int8_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 131, 1), (2, 20, 4), (17, 80, 16), (2, 576, 64), (2, 512, 256)], ids=str
)
def test_rows(shape, dtype, session_kernels):
    rows, width, group = shape
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    expected = [int8_rows(x, group, gelu) for gelu in (False, True)]
    with session_kernels as device:
        for seed in SEEDS:
            device.module.be(seed=seed)
            for gelu in (False, True):
                values, scales = int8_rows(x, group, gelu)
                found = _int8.from_tiles(values, rows, width)
                assert torch.equal(found, _int8.from_tiles(expected[gelu][0], rows, width))
                assert torch.equal(scales, expected[gelu][1])


@pytest.mark.parametrize("four", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 16, 1), (17, 64, 33), (70, 272, 100)], ids=str)
def test_products(size, dtype, four, kernels):
    rows, weight, bias = int8_product(*size, dtype, four)
    (found,) = linear_int8([rows], [weight], [bias], dtype)
    assert torch.equal(found, linear_int8_reference([rows], [weight], [bias], dtype)[0])


@pytest.mark.parametrize("columns", [40, 42])
def test_gate_and_residual(columns, kernels):
    """Both kinds of weights in one call; rows of several samples, of which one is empty; runs of columns and single."""
    made = [int8_product(70, 64, columns, torch.float16, four) for four in (False, True)]
    residual = [torch.randn(70, columns).half() for _ in made]
    gate = [torch.randn(3, columns).half(), torch.randn(1, columns).half()]
    offsets = [torch.tensor([0, 33, 33, 70], dtype=torch.int32), None]
    args = (*map(list, zip(*made)), torch.float16, residual, gate, offsets)
    for seed in SEEDS:
        kernels.module.be(seed=seed)
        for found, expected in zip(linear_int8(*args), linear_int8_reference(*args), strict=True):
            assert torch.equal(found, expected)
