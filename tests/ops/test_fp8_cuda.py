"""int8_rows and linear_int8 in float8 by the CUDA kernels, beside the formula in PyTorch.

Rows have its bits. Sums of products are exact where every partial sum is a small integer, as tensor cores keep those;
else they are as near as `near` says, since these add in an order and with digits of their own.
"""

import pytest
import torch

from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.ops import Int8Weight, _int8, gelu_tanh, int8_rows, linear_int8
from qwen_image_fast.ops.int8_rows import int8_rows_reference
from qwen_image_fast.ops.linear_int8 import linear_int8_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [(1, 1, 1), (3, 4, 4), (17, 80, 16), (3, 131, 1), (33, 192, 64), (2, 768, 256), (2, 6400, 256)]
SIZES = [(1, 4, 1), (17, 60, 33), (33, 192, 48), (150, 80, 140), (20, 464, 20), (1040, 16, 132)]


@pytest.fixture
def there(cuda):
    """Enters the device, and moves tensors and weights there. Skips GPUs without such products."""
    name, entered = cuda
    if name == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or newer")

    def move(found):
        if isinstance(found, (list, tuple)) and not isinstance(found, Int8Weight):
            return type(found)(map(move, found))
        if isinstance(found, (torch.Tensor, Int8Weight)) and name == "cuda":
            return found.to(torch.device("cuda"))
        return found

    return entered, move


def numbers(rows, width):
    """Bytes of the values, of which NaN is one, without what is filled up."""
    return rows[0].cpu()[:, :width].contiguous().view(torch.uint8), rows[1].cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape, dtype, there):
    """Without GELU and with it, whose bits are those of gelu_tanh on a CPU."""
    entered, move = there
    rows, width, group = shape
    x = (torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    expected = [int8_rows_reference(v, group, float8=True) for v in (x, gelu_tanh(x.float()))]
    with entered():
        for gelu in (False, True):
            found = int8_rows(move(x), group, gelu, float8=True)
            assert found[0].shape == (rows, -(-width // 64) * 64)
            for ours, theirs in zip(numbers(found, width), numbers(expected[gelu], width), strict=True):
                assert torch.equal(ours, theirs)
            filled = found[0].cpu()[:, width:].float()
            assert (filled == 0).all()  # where it is NaN, so is the sum


def test_every_number_and_what_lies_between(there):
    """All values of e4m3, halfway between two of them, and next to that: to the nearest, ties to even."""
    entered, move = there
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (exact[1:] + exact[:-1]) / 2
    beside = [torch.nextafter(halfway, halfway + d) for d in (1, -1)]
    x = torch.cat([exact, halfway, *beside])
    x = torch.cat([x, -x])[None].contiguous()  # has 448: the scale is 1
    with entered():
        values, scales = int8_rows(move(x), 1, float8=True)
    assert scales.item() == 1
    assert torch.equal(values.cpu()[:, : x.shape[1]].float(), x.to(torch.float8_e4m3fn).float())


def test_rows_of_zeros_and_beyond(there):
    entered, move = there
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2, 5], x[3, 5] = 0, 1e-36, float("inf"), float("nan")
    with entered():
        values, scales = (t.cpu() for t in int8_rows(move(x), 64, float8=True))
    assert (scales[:2] == 0).all() and (values[:2].float() == 0).all()
    assert not scales[2].isfinite() and scales[3].isnan() and scales[4:].isfinite().all()
    assert values[4:].float().abs().amax(1).eq(448).all()


def test_rows_with_a_stride(there):
    entered, move = there
    x = torch.randn(20, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = int8_rows_reference(x[:, 3:67], 64, float8=True)
    with entered():
        found = int8_rows(move(x)[:, 3:67], 64, float8=True)
    for ours, theirs in zip(numbers(found, 64), numbers(expected, 64), strict=True):
        assert torch.equal(ours, theirs)


def make(rows, depth, columns, dtype, most=2):
    """Rows, a weight and a bias of integers up to `most`, whose sums are exact; None: of random numbers."""
    g = torch.Generator().manual_seed(rows + depth + columns)

    def matrix(n):
        if most is None:
            return _int8.to_float8(torch.randn(n, depth, generator=g))[0]
        drawn = torch.randint(-most, most + 1, (n, depth), generator=g)
        return _int8.filled_up(drawn.float()).to(torch.float8_e4m3fn)

    sums = torch.zeros(columns, dtype=torch.int32)
    weight = Int8Weight(matrix(columns), sums, torch.rand(columns, generator=g), depth, 1)
    return (matrix(rows), torch.rand(rows, generator=g) / 1000), weight, torch.randn(columns, generator=g).to(dtype)


def compare(there, rows, weight, bias, dtype, *gated):
    """All of one call, there and by the formula."""
    entered, move = there
    expected = linear_int8_reference(rows, weight, bias, dtype, *gated)
    with entered():
        found = linear_int8(move(rows), move(weight), move(bias), dtype, *move(list(gated)))
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all() and torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, dtype, there):
    rows, weight, bias = make(*size, dtype)
    compare(there, [rows], [weight], [bias], dtype)


def near(rows, weight, digits):
    """What sums may be off: each partial sum by 2^-digits of itself, and none is larger than the sum of magnitudes."""
    x, w = rows[0].double().abs(), weight.packed.double().abs()
    return x @ w.T * (weight.scales[None] * rows[1][:, None]) * weight.depth * 2.0**-digits


def test_products_of_any_numbers(there):
    """Float32 sums on the emulator, 24 digits; a GPU's may keep 14."""
    entered, move = there
    rows, weight, _ = make(150, 464, 140, torch.float32, most=None)
    (expected,) = linear_int8_reference([rows], [weight], [None], torch.float32)
    with entered():
        (found,) = linear_int8([move(rows)], [move(weight)], [None], torch.float32)
    assert ((found.cpu() - expected).abs() <= near(rows, weight, 14 if found.is_cuda else 24) + 1e-7).all()


@pytest.mark.parametrize("columns", [(40, 24), (41, 22)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_residual(dtype, columns, there):
    """Two products, one without bias; a gate for each segment, one of them empty; columns in runs and one by one."""
    (a, w, b), (a2, w2, _) = make(70, 128, columns[0], dtype), make(30, 64, columns[1], dtype)
    g = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    residual = [normal(70, columns[0]).to(dtype), normal(30, columns[1]).to(dtype)]
    residual[0][3, 5] = 65504 if dtype == torch.float16 else 1
    gate = [normal(3, 80).to(dtype)[:, : columns[0]] * 1e4, normal(1, columns[1]).to(dtype)]
    offsets = [torch.tensor([0, 33, 33, 70], dtype=torch.int32), None]
    compare(there, [a, a2], [w, w2], [b, None], dtype, residual, gate, offsets)


def test_more_products_than_a_launch_takes(there):
    compare(there, *map(list, zip(*(make(n, 16, 7 * n, torch.bfloat16) for n in range(1, 11)))), torch.bfloat16)


def test_all_numbers(there):
    """Every number of float8 with every other, 16 products a sum."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    matrix = _int8.filled_up(codes.view(torch.float8_e4m3fn).float()[:, None].repeat(1, 16)).to(torch.float8_e4m3fn)
    weight = Int8Weight(matrix, torch.zeros(len(codes), dtype=torch.int32), torch.ones(len(codes)), 16, 1)
    compare(there, [(matrix, torch.ones(len(codes)))], [weight], [None], torch.float32)


def test_a_layer(there):
    """Of a model, in float8 there; and its gradient, which reads the weight."""
    entered, move = there
    g = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(40, 192, generator=g), torch.nn.Parameter(torch.randn(40, generator=g))
    layer, x = Int8Linear(quantised(weight).in_float8(), bias), torch.randn(2, 5, 192, generator=g)
    with torch.no_grad():
        expected, gradient = layer(x), layer.gradient(torch.ones(2, 5, 40))
        with entered():
            moved = layer.to(move(x).device)
            torch.testing.assert_close(moved(move(x)).cpu(), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(moved.gradient(move(torch.ones(2, 5, 40))).cpu(), gradient, rtol=1e-4, atol=1e-4)
