"""int8_rows and linear_int8 by the CUDA kernels: the bits of the CPU's."""

import pytest
import torch
from torch import Tensor

from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.ops import Int8Weight, _int4, _int8, int8_rows, linear_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, width, group: the smallest; odd; with a tail after whole pieces; of every group, in one and in several rounds of
# the threads; a last group of 64 that begins in the middle of 256.
ROWS = [(1, 1, 1), (3, 4, 4), (5, 20, 4), (17, 80, 16), (3, 131, 1), (33, 192, 64), (2, 4416, 64), (2, 768, 256),
        (2, 6400, 256)]  # fmt: skip
# Rows, depth, columns: one of each; tails of every tile; several blocks each way; every stage filled more than once;
# more blocks of rows than run beside each other.
SIZES = [(1, 4, 1), (17, 60, 33), (33, 192, 48), (150, 80, 140), (20, 464, 20), (1040, 16, 132)]


def moved(found, name):
    """The same, there; called where the device is entered."""
    if isinstance(found, Int8Weight):
        return found.to(torch.device("cuda" if name == "cuda" else "cpu"))
    if isinstance(found, Tensor):
        return found.cuda() if name == "cuda" else found
    return None if found is None else type(found)(moved(f, name) for f in found)


def assert_same_rows(found, expected, rows, width):
    values, scales = found[0].cpu(), found[1].cpu()
    assert torch.equal(_int8.from_tiles(values, rows, width), _int8.from_tiles(expected[0], rows, width))
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape, dtype, cuda):
    """Without GELU and with it, whose exponential is the same polynomial."""
    name, entered = cuda
    rows, width, group = shape
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    expected = [int8_rows(x, group, gelu) for gelu in (False, True)]
    with entered():
        there = moved(x, name)
        for gelu in (False, True):
            assert_same_rows(int8_rows(there, group, gelu), expected[gelu], rows, width)


def test_rows_of_zeros_and_beyond(cuda):
    name, entered = cuda
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2, 5], x[3, 5] = 0, 1e-36, float("inf"), float("nan")
    with entered():
        values, scales = (t.cpu() for t in int8_rows(moved(x, name), 64))
    values = _int8.from_tiles(values, 6, 64)
    assert (scales[:2] == 0).all() and (values[:2] == 0).all()
    assert not scales[2].isfinite() and scales[3].isnan() and scales[4:].isfinite().all()


@pytest.mark.parametrize("begin", [0, 3])
def test_rows_with_a_stride(begin, cuda):
    """Rows of a slice; ones that no pack of 16 bytes can read."""
    name, entered = cuda
    x = torch.randn(20, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = int8_rows(x[:, begin : begin + 64], 64)
    with entered():
        found = int8_rows(moved(x, name)[:, begin : begin + 64], 64)
    assert_same_rows(found, expected, 20, 64)


def make(rows, depth, columns, dtype, four=False):
    """Rows, a weight with all numbers of 8 bits, -128 too, or one in 4 bits, and a bias."""
    g = torch.Generator().manual_seed(rows + depth + columns)
    values = torch.randint(-127, 128, (rows, depth), generator=g, dtype=torch.int8)
    values[0] = 127
    if four:
        weight = Int8Weight.of_floats(torch.randn(columns, depth, generator=g), 1)
    else:
        numbers = torch.randint(-128, 128, (columns, depth), generator=g, dtype=torch.int8)
        numbers[0], numbers[-1] = -128, 127
        weight = Int8Weight.of(numbers, torch.rand(columns, generator=g), 1)
    bias = torch.randn(columns, generator=g).to(dtype)
    return (_int8.to_tiles(values), torch.rand(rows, generator=g) / 1000), weight, bias


def compare(cuda, rows, weight, bias, dtype, *gated):
    """All of one call, there and by the CPU."""
    name, entered = cuda
    expected = linear_int8(rows, weight, bias, dtype, *gated)
    values = [_int8.from_tiles(v, len(s), w.depth) for (v, s), w in zip(rows, weight)]
    with entered():
        there = [(_int8.to_tiles(moved(v, name)), moved(s, name)) for v, (_, s) in zip(values, rows)]
        found = linear_int8(there, *moved([weight, bias], name), dtype, *moved(list(gated), name))
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all() and torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("four", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, dtype, four, cuda):
    if four and size[1] % 16:
        size = (size[0], size[1] // 16 * 16 + 16, size[2])
    rows, weight, bias = make(*size, dtype, four)
    compare(cuda, [rows], [weight], [bias], dtype)


@pytest.mark.parametrize("columns", [(40, 24), (41, 22)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_residual(dtype, columns, cuda):
    """Two products, in 8 and in 4 bits, one without bias; a gate for each segment, of which one is empty; columns in
    runs and one by one."""
    (a, w, b), (a2, w2, _) = make(70, 128, columns[0], dtype), make(30, 64, columns[1], dtype, four=True)
    g = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    residual = [normal(70, columns[0]).to(dtype), normal(30, columns[1]).to(dtype)]
    residual[0][3, 5] = 65504 if dtype == torch.float16 else 1
    gate = [normal(3, 80).to(dtype)[:, : columns[0]] * 1e4, normal(1, columns[1]).to(dtype)]
    offsets = [torch.tensor([0, 33, 33, 70], dtype=torch.int32), None]
    compare(cuda, [a, a2], [w, w2], [b, None], dtype, residual, gate, offsets)


def test_more_products_than_a_launch_takes(cuda):
    made = [make(n, 16 * n, 7 * n, torch.bfloat16, four=n % 3 == 0) for n in range(1, 15)]
    compare(cuda, *map(list, zip(*made)), torch.bfloat16)


def test_segments_of_equal_length(cuda):
    rows, weight, bias = make(48, 64, 20, torch.bfloat16)
    residual, gate = torch.randn(48, 20).bfloat16(), torch.randn(3, 20).bfloat16()
    compare(cuda, [rows], [weight], [bias], torch.bfloat16, [residual], [gate], [None])


def test_all_codes_with_all_times(cuda):
    """Every number that 4 bits can stand for: products with rows that pick one number each."""
    levels = torch.arange(16, dtype=torch.uint8)
    times = torch.tensor([0, *range(8, 121)], dtype=torch.uint8)
    codes = (levels[::2] | levels[1::2] << 4).expand(len(times), 8).contiguous()
    weight = Int8Weight.of_codes(codes, times[:, None], torch.ones(len(times)), 1)
    rows = _int8.to_tiles(torch.eye(16, dtype=torch.int8)), torch.ones(16)
    compare(cuda, [rows], [weight], [None], torch.float32)
    expected = (torch.tensor(_int4.LEVELS) * times[:, None].int() + 64) >> 7
    assert torch.equal(linear_int8([rows], [weight], [None], torch.float32)[0], expected.T.float())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_layer(precision, cuda):
    """Of a model, moved there and back; and its gradient, which reads the weight."""
    name, entered = cuda
    g = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(40, 192, generator=g), torch.nn.Parameter(torch.randn(40, generator=g))
    layer, x = Int8Linear(quantised(weight, precision=precision), bias), torch.randn(2, 5, 192, generator=g)
    with torch.no_grad():
        expected, gradient = layer(x), layer.gradient(layer(x))
        with entered():
            found = layer.to("cuda" if name == "cuda" else "cpu")(moved(x, name))
            torch.testing.assert_close(layer.gradient(found).cpu(), gradient, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.cpu(), expected) and torch.equal(layer.to("cpu")(x), expected)
