"""Weights in 4 bits: the integers they become, their error, their rows in files, and products with them."""

import pytest
import torch

from qwen_image_fast.ops import Int8Weight, _int4, _int8, int8_rows, int8_unit, linear_int8, reference
from qwen_image_fast.ops.linear_int8 import UNITS
from qwen_image_fast.weights.scales import grouped

SHAPES = [(16, 64), (33, 96), (64, 320), (100, 1040), (48, 2112)]


def weight_of(columns, depth, group=16):
    g = torch.Generator().manual_seed(columns * depth)
    rotated = torch.randn(columns, depth, generator=g) * torch.rand(columns, 1, generator=g)
    return Int8Weight.of_floats(rotated, group), rotated


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_integers_are_those_of_the_formula(shape):
    weight, _ = weight_of(*shape)
    assert weight.four and weight.packed.dtype == torch.uint8
    assert torch.equal(_int4.in_8_bits(weight.packed), _int4.in_8_bits_reference(weight.packed))
    values = weight.values()
    assert values.shape == shape and torch.equal(weight.sums, values.sum(1, dtype=torch.int32))
    codes, times = _int4.to_rows(weight.packed, *shape)
    levels = torch.tensor(_int4.LEVELS)[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    product = levels * times.repeat_interleave(16, 1)
    assert torch.equal(values.double(), (product / 128.0).round()) and not (product % 128 == 64).any()
    again = Int8Weight.of_codes(codes, times, weight.scales, 16)
    assert torch.equal(again.packed, weight.packed) and torch.equal(again.sums, weight.sums)


def test_codes_are_the_nearest_and_times_close_to_the_best():
    """Of every group: no level is nearer to a number, and of all times few are better, by little."""
    weight, rotated = weight_of(33, 96)
    levels, tried = torch.tensor(_int4.LEVELS), torch.tensor([t for t in range(8, 121) if t != 64])
    grid = ((tried[:, None] * levels + 64) >> 7).float()
    steps = (rotated / weight.scales[:, None]).view(33, 6, 16)
    errors = (steps[..., None, :, None] - grid[:, None]).square().amin(-1).sum(-1)
    _, times = _int4.to_rows(weight.packed, 33, 96)
    found = (weight.values().view(33, 6, 16) - steps).square().sum(-1)
    own = errors.gather(-1, (times.long() - 8 - (times > 64).long())[..., None])[..., 0]
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-2)
    best = errors.amin(-1)
    assert (found >= best * 0.999).all() and found.sum() < 1.06 * best.sum()


def test_the_error_of_gaussian_numbers():
    weight, rotated = weight_of(256, 3072)
    error = (weight.values() * weight.scales[:, None] - rotated).norm() / rotated.norm()
    assert 0.06 < error < 0.0695


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_the_scale_so(value):
    rotated = torch.randn(3, 64)
    rotated[1, 5] = value
    assert torch.isfinite(Int8Weight.of_floats(rotated, 16).scales).tolist() == [True, False, True]


def test_zeros_stay_zeros():
    rotated = torch.zeros(20, 80)
    rotated[3, 16:32] = 1.0
    values = Int8Weight.of_floats(rotated, 16)
    assert not values.values()[[0, 19]].any() and not values.values()[3, 32:].any() and values.scales[0] == 0
    torch.testing.assert_close(values.values()[3, 16:32] * values.scales[3], torch.ones(16), rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_files_hold_what_comfy_decodes(shape):
    weight, _ = weight_of(*shape, group=4)
    codes, times = _int4.to_rows(weight.packed, *shape)
    parts = {
        "weight": codes.view(torch.int8), "s_rel": times.float(), "s_channel": weight.scales,
        "codebook": torch.tensor(_int4.LEVELS) / 128,
    }  # fmt: skip
    decoded = grouped(shape[1], 4, 16, 4)(parts, 0, torch.float32)
    expected = _int8.rotated(weight.values() * weight.scales[:, None], 4)
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("rows", [1, 37, 400])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_integers(shape, rows, unit):
    """The same bits as of the same weight in 8 bits, beside one in a call, and as the formula's."""
    weight, _ = weight_of(*shape)
    eight = Int8Weight.of(weight.values(), weight.scales, 16)
    g = torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, shape[1], generator=g), torch.randn(shape[0], generator=g)
    taken = int8_rows(x, 16)
    with int8_unit(unit):
        four, both = linear_int8([taken, taken], [weight, eight], [bias, bias], torch.float32)
    assert torch.equal(four, both)
    with reference():
        (expected,) = linear_int8([taken], [weight], [bias], torch.float32)
    assert torch.equal(four, expected)
