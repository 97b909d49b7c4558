"""int8_rows and linear_int8: bit for bit their references, on every set of kernels and every unit of this CPU."""

import harness
import pytest
import torch

from qwen_image_fast import _C, ops
from qwen_image_fast.ops import Int8Weight, _int8, int8_rows, int8_unit, linear_int8
from qwen_image_fast.ops.int8_rows import int8_rows_reference
from qwen_image_fast.ops.linear_int8 import UNITS, linear_int8_reference
from qwen_image_fast.weights.scales import rotation

DTYPES = harness.DTYPES
# Rows, width, group: the smallest; odd; with a tail after whole vectors; the tiny model's; the released model's.
ROWS = [(1, 1, 1), (3, 4, 4), (5, 20, 4), (17, 80, 16), (33, 192, 64), (16, 768, 256), (2, 12288, 256)]
# Rows, depth, columns: one of each; tails of every tile; more than a block of rows, of columns and of the depth.
SIZES = [(1, 4, 1), (17, 60, 33), (33, 192, 48), (70, 64, 100), (600, 128, 40), (40, 6400, 300)]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in harness.INSTRUCTION_SETS:
        pytest.skip("this CPU does not have it")
    before = _C.build_info()["cpu_in_use"]
    _C.set_isa(request.param)
    yield
    _C.set_isa(before)


@pytest.fixture(params=["plain", "avx2", "avx_vnni", "avx512_vnni", "amx"])
def unit(request):
    if request.param not in UNITS:
        pytest.skip("this CPU does not have it")
    with int8_unit(request.param):
        yield


def numbers(tiles, rows, width):
    return _int8.from_tiles(tiles[0], rows, width), tiles[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape, dtype, isa):
    rows, width, group = shape
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    for a, b in zip(numbers(int8_rows(x, group), rows, width), numbers(int8_rows_reference(x, group), rows, width)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_the_rotation_is_that_of_the_files(group):
    """Stage by stage as by the matrix of weights/scales.py; twice, it is undone."""
    x = torch.randn(5, 512, dtype=torch.float64)
    by_matrix = (x.view(5, -1, group) @ rotation(group).double()).view(x.shape)
    torch.testing.assert_close(_int8.rotated(x, group), by_matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_int8.rotated(_int8.rotated(x, group), group), x, rtol=1e-12, atol=1e-12)


def test_rows_after_gelu(isa):
    """As close to GELU in float64 as an 8-bit number can be, and a hundredth more."""
    x = torch.randn(40, 256) * 3
    values, scales = numbers(int8_rows(x, 1, gelu=True), 40, 256)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert ((values.double() * scales[:, None] - exact).abs() <= 0.505 * scales[:, None]).all()


def test_rows_of_zeros_and_beyond(isa):
    x = torch.randn(6, 64)
    x[0], x[1], x[2, 5], x[3, 5] = 0, 1e-36, float("inf"), float("nan")
    values, scales = numbers(int8_rows(x, 1), 6, 64)
    assert (scales[:2] == 0).all() and (values[:2] == 0).all()
    assert scales[2].isinf() and scales[3].isnan() and scales[4:].isfinite().all()


def test_rows_with_a_stride(isa):
    x = torch.randn(20, 3, 64)
    a, b = int8_rows(x[:, 1], 64), int8_rows(x[:, 1].contiguous(), 64)
    assert torch.equal(numbers(a, 20, 64)[0], numbers(b, 20, 64)[0]) and torch.equal(a[1], b[1])


def make(rows, depth, columns, dtype=torch.float32):
    """Rows, a weight with all numbers of 8 bits, -128 too, and a bias."""
    g = torch.Generator().manual_seed(rows + depth + columns)
    values = torch.randint(-127, 128, (rows, depth), generator=g, dtype=torch.int8)
    values[0] = 127  # the largest sums, which saturate where 16 bits are added carelessly
    numbers = torch.randint(-128, 128, (columns, depth), generator=g, dtype=torch.int8)
    numbers[0], numbers[-1] = -128, 127
    weight = Int8Weight.of(numbers, torch.rand(columns, generator=g), 1)
    bias = torch.randn(columns, generator=g).to(dtype)
    return (_int8.to_tiles(values), torch.rand(rows, generator=g)), weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, dtype, unit):
    rows, weight, bias = make(*size, dtype)
    assert torch.equal(
        linear_int8([rows], [weight], [bias], dtype)[0], linear_int8_reference([rows], [weight], [bias], dtype)[0]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_residual(dtype, unit):
    """Two products, one without bias; a gate for each segment, of which one is empty."""
    (a, w, b), (a2, w2, _) = make(70, 128, 40, dtype), make(30, 64, 24, dtype)
    residual = [torch.randn(70, 40).to(dtype), torch.randn(30, 24).to(dtype)]
    residual[0][3, 5] = 65504 if dtype == torch.float16 else 1
    gate = [torch.randn(3, 80).to(dtype)[:, :40] * 1e4, torch.randn(1, 24).to(dtype)]
    offsets = [torch.tensor([0, 33, 33, 70], dtype=torch.int32), None]
    args = ([a, a2], [w, w2], [b, None], dtype, residual, gate, offsets)
    for ours, theirs in zip(linear_int8(*args), linear_int8_reference(*args), strict=True):
        assert torch.isfinite(ours).all() and torch.equal(ours, theirs)


def test_the_same_bits_for_any_number_of_threads(unit):
    rows, weight, bias = make(300, 3200, 200)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(linear_int8([rows], [weight], [bias], torch.float32)[0])
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_packing_is_undone():
    for columns, depth in ((1, 1), (33, 70), (16, 64), (100, 192)):
        numbers = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
        weight = Int8Weight.of(numbers, torch.rand(1), 1)
        assert torch.equal(weight.values(), numbers) and torch.equal(weight.sums, numbers.sum(1, dtype=torch.int32))
        assert weight.scales.shape == (columns,)
        rows = _int8.in_rows(weight.packed, columns)  # as on a GPU
        assert torch.equal(rows, _int8.filled_up(numbers)) and rows.shape[1] % 64 == 0
        there = weight._replace(packed=rows)
        assert torch.equal(there.values(), numbers) and torch.equal(there.laid_out().packed, weight.packed)


def test_empty():
    rows, weight, bias = make(4, 64, 20)
    none = int8_rows(torch.empty(0, 64), 64)
    assert [t.shape for t in linear_int8([none, rows], [weight] * 2, [bias] * 2, torch.float32)] == [(0, 20), (4, 20)]


def test_as_registered_ops():
    x = torch.randn(20, 128)
    _, weight, bias = make(20, 128, 24)
    rows = int8_rows(x, 64)
    harness.check_opcheck(torch.ops.qwen_image_fast.int8_rows, [x, 64, True])

    def layer(x):
        return linear_int8([int8_rows(x, 64)], [weight], [bias], torch.float32)[0]

    assert torch.equal(torch.compile(layer, fullgraph=True, dynamic=True)(x), layer(x))
    with ops.reference():
        assert torch.equal(layer(x), linear_int8([rows], [weight], [bias], torch.float32)[0])


def test_errors():
    rows, weight, bias = make(4, 64, 20)
    with pytest.raises(ValueError, match=r"int8_rows: group must be one of .* that divides the width 96, got 64"):
        int8_rows(torch.randn(2, 96), 64)
    with pytest.raises(TypeError, match="int8_rows: dtype must be float32, float16 or bfloat16, got torch.float64"):
        int8_rows(torch.randn(2, 64).double(), 64)
    with pytest.raises(ValueError, match="int8_rows: x must not need gradients"):
        int8_rows(torch.randn(2, 64, requires_grad=True), 64)
    with pytest.raises(ValueError, match=r"linear_int8: rows must be the uint8 tiles of 4 rows .* 2 tiles"):
        linear_int8([rows], [make(4, 128, 20)[1]], [bias], torch.float32)
    with pytest.raises(ValueError, match="linear_int8: bias must be torch.bfloat16"):
        linear_int8([rows], [weight], [bias], torch.bfloat16)
    with pytest.raises(ValueError, match="linear_int8: weight must hold 1 tensors like rows, got 2"):
        linear_int8([rows], [weight] * 2, [bias], torch.float32)
    with pytest.raises(ValueError, match="linear_int8: residual must be contiguous"):
        linear_int8([rows], [weight], [bias], torch.float32, [torch.randn(20, 4)], [torch.randn(1, 20)], [None])
    with pytest.raises(ValueError, match="int8_unit: name must be one of plain"):
        int8_unit("abacus")
