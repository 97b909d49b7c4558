"""The 8-bit layers as compiled: the bits of the formula, in any order that the interpreter draws."""

import pytest
import torch

from ptx.cases import SEEDS, cancelling_product, fp8_product, int8_product
from qwen_image_fast.ops import Int8Weight, _int8, gelu_tanh, int8_kernels, int8_rows, linear_int8
from qwen_image_fast.ops.int8_rows import int8_rows_reference
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 131, 1), (17, 80, 16), (2, 512, 256)], ids=str)
def test_float8_rows(shape, dtype, session_kernels):
    rows, width, group = shape
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    expected = [int8_rows_reference(v, group, float8=True) for v in (x, gelu_tanh(x.float()))]
    with session_kernels as device:
        for seed in SEEDS:
            device.module.be(seed=seed)
            for gelu in (False, True):
                values, scales = int8_rows(x, group, gelu, float8=True)
                assert torch.equal(values[:, :width].float(), expected[gelu][0][:, :width].float())
                assert torch.equal(scales, expected[gelu][1])


def test_rounding_to_float8(kernels):
    """All values of e4m3, halfway between two of them, and next to that: to the nearest, ties to even."""
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (exact[1:] + exact[:-1]) / 2
    x = torch.cat([exact, halfway, *(torch.nextafter(halfway, halfway + d) for d in (1, -1))])
    x = torch.cat([x, -x])[None].contiguous()  # has 448: the scale is 1
    values, _ = int8_rows(x, 1, float8=True)
    assert torch.equal(values[:, : x.shape[1]].float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 16, 1), (17, 64, 33), (70, 272, 100)], ids=str)
def test_float8_products(size, dtype, kernels):
    """Of small integers, whose sums are exact in any order."""
    rows, weight, bias = fp8_product(*size, dtype)
    (found,) = linear_int8([rows], [weight], [bias], dtype)
    assert torch.equal(found, linear_int8_reference([rows], [weight], [bias], dtype)[0])


def test_float8_gate_and_residual(kernels):
    """Rows of several samples, of which one is empty; runs of columns and single ones."""
    made = [fp8_product(70, 64, columns, torch.float16) for columns in (40, 42)]
    residual = [torch.randn(70, columns).half() for columns in (40, 42)]
    gate = [torch.randn(3, 40).half(), torch.randn(1, 42).half()]
    offsets = [torch.tensor([0, 33, 33, 70], dtype=torch.int32), None]
    args = (*map(list, zip(*made)), torch.float16, residual, gate, offsets)
    for seed in SEEDS:
        kernels.module.be(seed=seed)
        for found, expected in zip(linear_int8(*args), linear_int8_reference(*args), strict=True):
            assert torch.equal(found, expected)


def test_all_float8_numbers(kernels):
    """Every number with every other, 16 products a sum; NaN makes its row and its column NaN and no others."""
    codes = torch.arange(256, dtype=torch.uint8)
    matrix = torch.zeros(256, 64, dtype=torch.uint8)
    matrix[:, :16] = codes[:, None]
    rows = matrix.view(torch.float8_e4m3fn)
    weight = Int8Weight(rows.clone(), torch.zeros(256, dtype=torch.int32), torch.ones(256), 64, 1)
    (found,) = linear_int8([(rows, torch.ones(256))], [weight], [None], torch.float32)
    expected = linear_int8_reference([(rows, torch.ones(256))], [weight], [None], torch.float32)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 4 * 256 - 4


# Hopper's kernels. Rows, depth, columns: the smallest; tails of every tile; several tiles each way; every stage of
# shared memory used again, with a rest of the depth.
HOPPER = [(1, 16, 8), (17, 64, 40), (300, 272, 264), (140, 1344, 136)]


def wgmma(device, *args):
    """By Hopper's kernels, and that these ran."""
    device.module.launched()
    with int8_kernels("wgmma"):
        found = linear_int8(*args)
    assert all("LinearInt8Sm90" in name for name in device.module.launched())
    for ours, theirs in zip(found, linear_int8_reference(*args), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", HOPPER, ids=str)
def test_products_on_hopper(size, dtype, linear):
    rows, weight, bias = int8_product(*size, dtype)
    wgmma(linear, [rows], [weight], [bias], dtype)
    wgmma(linear, [rows], [weight], [None], dtype)


def test_products_of_several_sizes_on_hopper(linear):
    """Two launches, of seven products of one size and of one; none, a few and many rows; one rows' weight for two."""
    made = [int8_product(n, 80, 136, torch.bfloat16) for n in (130, 1, 300, 64, 65, 2)]
    made += [(made[0][0], *made[3][1:]), int8_product(33, 64, 24, torch.bfloat16)]
    for processors in (2, 6):
        linear.module.be(processors=processors)
        wgmma(linear, *map(list, zip(*made)), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gate_and_residual_on_hopper(dtype, linear):
    """Samples that begin anywhere, one of them empty, and of equal length; a result that saturates in float16."""
    made = [int8_product(n, 200, 136, dtype) for n in (140, 4)]
    draw = torch.Generator().manual_seed(1)
    residual = [torch.randn(n, 136, generator=draw).to(dtype) for n in (140, 4)]
    residual[0][3, 5] = 65504 if dtype == torch.float16 else 1
    gate = [torch.randn(3, 272, generator=draw).to(dtype)[:, :136] * 100, torch.randn(2, 136, generator=draw).to(dtype)]
    offsets = [torch.tensor([0, 33, 33, 140], dtype=torch.int32), None]
    for seed in SEEDS if dtype == torch.bfloat16 else SEEDS[:3]:
        linear.module.be(seed=seed, processors=2)
        wgmma(linear, *map(list, zip(*made)), dtype, residual, gate, offsets)


def test_nothing_is_contracted_on_hopper(linear):
    rows, weight, bias = cancelling_product(140, 64, 264, torch.bfloat16)
    wgmma(linear, [rows], [weight], [bias], torch.bfloat16)


def test_all_numbers_on_hopper(linear):
    """Every number of 8 bits with every other; the largest sums."""
    weight = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(256, 16).contiguous()
    values = torch.arange(-127, 128, dtype=torch.int8)[:, None].expand(255, 16).contiguous()
    made = Int8Weight.of(weight, torch.ones(256), 1)
    made = made._replace(packed=made.packed.clone(), sums=made.sums.clone())
    wgmma(linear, [(_int8.to_tiles(values), torch.ones(255))], [made], [None], torch.bfloat16)


def test_what_hopper_cannot_take(linear):
    rows, weight, bias = int8_product(4, 64, 20, torch.bfloat16)
    with int8_kernels("wgmma"):
        with pytest.raises(ValueError, match="weight must be in 8 bits, with a multiple of 8 columns, .* 8 bits, 20"):
            linear_int8([rows], [weight], [bias], torch.bfloat16)
        with pytest.raises(ValueError, match="dtype must be float16 or bfloat16 for wgmma, got torch.float32"):
            linear_int8([rows], [weight], [bias.float()], torch.float32)
        rows, weight, bias = int8_product(4, 64, 16, torch.bfloat16, four=True)
        with pytest.raises(ValueError, match="weight must be in 8 bits, .* 4 bits, 16"):
            linear_int8([rows], [weight], [bias], torch.bfloat16)
