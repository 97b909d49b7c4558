"""picture_statistics against its formulas in numpy, on every instruction set of this CPU."""

import dataclasses

import numpy as np
import pytest

from qwen_image_fast import _C
from qwen_image_fast.ops import picture_statistics, reference

SETS = ["baseline", "avx2", "avx512"]
SETS = SETS[: SETS.index(_C.build_info()["cpu_best"]) + 1]


@pytest.fixture(params=SETS)
def isa(request):
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(_C.build_info()["cpu_best"])


@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (3, 3), (4, 17), (33, 64), (96, 131)])
@pytest.mark.parametrize("high", [1, 4, 256])
def test_equal_to_the_formulas(isa, height, width, high):
    rgb = np.random.default_rng(width).integers(0, high, (height, width, 3)).astype(np.uint8)
    found = picture_statistics(rgb)
    with reference():
        expected = picture_statistics(rgb)
    assert np.abs(found.luma - expected.luma).max() < 1e-4
    assert (found.histogram == expected.histogram).all() and found.histogram.sum() == 3 * height * width
    for name in ("luma_sum", "saturation_sum", "gradient", "laplacian", "noise"):
        if name in ("gradient", "laplacian", "noise") and min(height, width) < 3:
            assert getattr(found, name) is getattr(expected, name) is None
            continue
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=2e-5, abs=1e-4), name
    again = picture_statistics(np.asfortranarray(rgb))
    first, second = dataclasses.asdict(found), dataclasses.asdict(again)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rgb", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_other_arrays_are_refused(rgb):
    with pytest.raises(ValueError, match="rgb must be uint8"):
        picture_statistics(rgb)
