"""Which kernels of a GPU multiply in 8 bits: by its capability, the build, the products, and what is asked for."""

import importlib

import pytest
import torch

from qwen_image_fast.ops import Int8Weight, _eight_bits, _int8, _library, int8_kernels, linear_int8

op = importlib.import_module("qwen_image_fast.ops.linear_int8")
MMA, WGMMA = ("linear_int8", 1), ("linear_int8_sm90", 1)


@pytest.fixture
def launched(monkeypatch):
    """Tensors of the CPU count as those of a Hopper GPU, whose launches are noted: the name, how many products."""
    found = []
    monkeypatch.setattr(_library, "on_cuda", lambda x: True)
    monkeypatch.setattr(_library, "launch", lambda name, on, products, *rest: found.append((name, len(products))))
    monkeypatch.setattr(op, "WGMMA", True)
    monkeypatch.setattr(_eight_bits, "capability_of", lambda device: (9, 0))
    return found


def product(rows=op.FEW, columns=40, four=False):
    values = _int8.to_tiles(torch.zeros(rows, 96, dtype=torch.int8))
    weight = torch.zeros(columns, 96)
    made = Int8Weight.of_floats(weight, 1) if four else Int8Weight.of(weight.to(torch.int8), torch.ones(1), 1)
    return (values, torch.ones(rows)), made.laid_out(), None


def called(launched, made, dtype=torch.bfloat16, **gated):
    linear_int8(*map(list, zip(*made)), dtype, **gated)
    names = launched[:]
    launched.clear()
    return names


def test_what_hopper_runs(launched):
    assert called(launched, [product()]) == [WGMMA]
    assert called(launched, [product()], torch.float16) == [WGMMA]
    assert called(launched, [product(), product(7)]) == [("linear_int8_sm90", 2)]
    assert called(launched, [product()], torch.float32) == [MMA]
    assert called(launched, [product(columns=42)]) == [MMA]
    assert called(launched, [product(four=True)]) == [MMA]
    assert called(launched, [product(op.FEW - 1), product(1)]) == [("linear_int8", 2)]
    assert called(launched, [product(0)]) == []


def test_each_product_by_what_takes_it(launched):
    made = [product(), product(columns=42), product(four=True), product(9, columns=24)]
    assert called(launched, made) == [("linear_int8_sm90", 2), ("linear_int8", 2)]


def test_data_that_tensor_maps_cannot_read(launched):
    gate, flat = torch.zeros(1, 42).bfloat16(), torch.zeros(op.FEW * 40 + 1).bfloat16()
    fine, odd = flat[:-1].view(-1, 40), flat[1:].view(-1, 40)
    assert called(launched, [product()], residual=[fine], gate=[gate[:, :40]]) == [WGMMA]
    assert called(launched, [product()], residual=[odd], gate=[gate[:, :40]]) == [MMA]
    assert called(launched, [product()], residual=[fine], gate=[gate[:, 1:41]]) == [MMA]
    with int8_kernels("wgmma"), pytest.raises(ValueError, match="linear_int8: data must be aligned to 16 bytes"):
        called(launched, [product()], residual=[odd], gate=[gate[:, :40]])


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus(capability, launched, monkeypatch):
    monkeypatch.setattr(_eight_bits, "capability_of", lambda device: capability)
    assert called(launched, [product()]) == [MMA]


def test_a_build_without(launched, monkeypatch):
    monkeypatch.setattr(op, "WGMMA", False)
    assert called(launched, [product()]) == [MMA]


def test_what_is_asked_for(launched):
    with int8_kernels("mma.sync"):
        assert called(launched, [product()]) == [MMA]
    with int8_kernels("wgmma"):
        assert called(launched, [product(3)]) == [WGMMA]
    with pytest.raises(ValueError, match=r"int8_kernels: choice must be one of best, mma.sync, wgmma, got 'cutlass'"):
        int8_kernels("cutlass")


def test_a_weight_of_the_cpu_is_refused(launched):
    rows, weight, _ = product()
    packed = weight._replace(packed=_int8.empty_packed(40, 96)[0])
    with pytest.raises(ValueError, match="weight must be an Int8Weight of 40 columns, as it is laid out on"):
        linear_int8([rows], [packed], [None], torch.bfloat16)
