"""Every kernel as compiled: right results, and nothing to complain of, in any order that the interpreter draws."""

import functools
import itertools
import re

import pytest
import torch

from ptx.cases import KERNELS, LINEAR, SEEDS, convolution, fp8_product, int8_product, products
from qwen_image_fast import doctor
from qwen_image_fast.doctor_cases import as_tuple, functions, inputs
from qwen_image_fast.ops import (
    channel_norm_silu,
    gate_residual_norm_modulate,
    int8_kernels,
    int8_rows,
    joint_attention,
    layer_norm_modulate,
    linear_int8,
)
from qwen_image_fast.ops.channel_norm_silu import add_channel_norm_silu
from qwen_image_fast.ops.joint_attention import bounded_attention

OWN = ["layer_norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "gelu_tanh", "guided_step",
       "joint_attention", "channel_norm_silu"]  # fmt: skip
SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("size", [(45, 192), (21, 128), (9, 3072)], ids=str)
@pytest.mark.parametrize("op", OWN)
def test_own(op, size, dtype, kernels):
    """Forward and backward, by the doctor's rule: at most twice the error of the reference."""
    if size[1] == 3072 and op in ("joint_attention", "channel_norm_silu"):
        size = (150, 256)  # several tiles, and half of a wide row's channels
    verdict = doctor._judge(op, "interpreted", "cpu", dtype, *size)
    assert verdict.problem is None and verdict.worst <= 1, verdict


def off_by_one(t):
    """The same values, one element further on: what a pack of 16 bytes cannot read."""
    if not (isinstance(t, torch.Tensor) and t.is_floating_point()):
        return t
    moved = torch.cat([t.detach().new_zeros(1), t.detach().flatten()])[1:].view(t.shape)
    return moved.requires_grad_(t.requires_grad)


# Widths that choose among the instantiations of a kernel: rows in registers or not, lanes of a warp for a row.
WIDTHS = {
    "layer_norm_modulate": (1024, 3072, 4096),
    "gate_residual_norm_modulate": (1024, 3072, 4096),
    "joint_attention": (64, 128),
    "channel_norm_silu": (512, 768, 1536, 3072, 6144, 8192),
}


def test_every_instantiation(kernels):
    """No kernel of ours in the PTX is left out: aligned or not, with FP8 rows, of every width and dtype."""
    kernels.module.launched()
    for dtype in (torch.float32, *SIXTEEN):
        for op, width in ((name, n) for name in OWN for n in WIDTHS.get(name, (256,))):
            for change in (lambda t: t, off_by_one):
                args = [change(a) for a in inputs(op, 6, width, dtype)]
                outs = as_tuple(functions(op)[0](*args))
                sum(o.float().sum() for o in outs).backward()
                assert all(o.isfinite().all() for o in outs)
                if op.endswith("norm_modulate"):
                    functions(op)[0](*(a.detach() for a in args), fp8=True)
                if op == "channel_norm_silu":
                    x, gamma, bias = (a.detach() for a in args[:3])
                    for rest, norm in itertools.product((None, x), (None, gamma)):
                        assert add_channel_norm_silu(x, bias, rest, norm).isfinite().all()
        for change, gelu in ((lambda t: t, True), (off_by_one, False)):
            for float8 in (False, True):
                int8_rows(change(torch.randn(2, 64).to(dtype)), 64, gelu, float8)
        for make in (int8_product, functools.partial(int8_product, four=True), fp8_product):
            rows, weight, bias = make(3, 16, 5, dtype)
            assert linear_int8([rows], [weight], [bias], dtype)[0].isfinite().all()
        if dtype != torch.float32:
            q = torch.randn(9, 2, 32, dtype=dtype, requires_grad=True)
            joint_attention(q, q, q, (4, 5)).float().sum().backward()
            for channels in (64, 200):
                convolution(kernels, (1, 4, 4, 8), channels, dtype=dtype)
    entries = {e for text in kernels.ptx.values() for e in re.findall(r"\.entry (\w+)\(", text)}
    assert kernels.module.launched() == entries


def test_every_linear_kernel(linear):
    linear.module.launched()
    for op, kernel, dtype in itertools.product(LINEAR, KERNELS, SIXTEEN):
        products(linear, op, kernel, (3, 2), 64, 64, dtype=dtype)
    for dtype in SIXTEEN:
        rows, weight, bias = int8_product(3, 64, 64, dtype)
        residual, gate = torch.randn(3, 64).to(dtype), torch.randn(1, 64).to(dtype)
        with int8_kernels("wgmma"):
            for more in ((), ([residual], [gate], [None])):
                assert linear_int8([rows], [weight], [bias], dtype, *more)[0].isfinite().all()
    entries = {e for text in linear.ptx.values() for e in re.findall(r"\.entry (\w+)\(", text)}
    assert linear.module.launched() == entries


@pytest.mark.parametrize("op", OWN)
def test_own_in_any_order(op, kernels):
    for seed in SEEDS:
        kernels.module.be(seed=seed)
        assert doctor._judge(op, "interpreted", "cpu", torch.bfloat16, 21, 128).problem is None


@pytest.mark.parametrize("channels", [96, 800])
def test_sums_in_front_of_a_norm_in_any_order(channels, kernels):
    x, added, gamma = torch.randn(21, channels).bfloat16(), *torch.randn(2, channels).bfloat16()
    expected = channel_norm_silu(x + added, gamma)
    for seed in SEEDS:
        kernels.module.be(seed=seed)
        assert torch.equal(add_channel_norm_silu(x.clone(), added, gamma=gamma, inplace=True), expected)
        assert torch.equal(add_channel_norm_silu(x, added, x), (2 * x.float() + added).bfloat16())


def test_attention_of_lengths_on_the_device(kernels):
    """In any order: the bits of lengths that Python knows, with NaN in rows of no sample."""
    lens, more = (130, 0, 5), 70
    q = torch.randn(135, 1, 32).bfloat16()
    cu = torch.tensor([0, 130, 130, 135], dtype=torch.int32)
    filled = torch.cat([q, q.new_full((more, 1, 32), float("nan"))])
    expected = joint_attention(q, q, q, lens)
    for seed in SEEDS:
        kernels.module.be(seed=seed)
        assert torch.equal(bounded_attention(filled, filled, filled, cu, cu, 205, 205)[:135], expected)


def test_rows_that_no_pack_divides(kernels):
    x, v = torch.randn(5, 101).bfloat16(), torch.randn(1, 101).bfloat16()
    out = layer_norm_modulate(x, v, v)
    exact = torch.nn.functional.layer_norm(x.double(), (101,), eps=1e-6) * (1 + v.double()) + v.double()
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)


def test_fp8_rows(kernels):
    """The second outputs, rows of e4m3 and their scales, say the same as the first."""
    x, y, v = torch.randn(7, 256).bfloat16(), torch.randn(7, 256).bfloat16(), torch.randn(1, 256).bfloat16()
    for outs in (layer_norm_modulate(x, v, v, fp8=True), gate_residual_norm_modulate(x, y, v, v, v, fp8=True)):
        normed, values, scales = outs[-3:]
        restored = values.float() * scales.reshape(-1, 1)
        torch.testing.assert_close(restored, normed.float(), rtol=0.07, atol=0.02)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        ((1, 9, 15, 32), 96), ((1, 9, 9, 96), 192), ((1, 3, 43, 16), 384), ((2, 9, 7, 24), 8),
        ((2, 6, 5, 24), 200, (2, 2), (1, 1), False), ((1, 7, 6, 40), 384, (3, 3), (0, 1)),
        ((1, 5, 4, 8), 16, (1, 1), (0, 0)), ((1, 1, 1, 8), 8), ((1, 20, 21, 8), 64, (3, 3), (1, 1), False),
    ],
    ids=str,
)  # fmt: skip
def test_conv2d(case, dtype, kernels):
    """Both tiles, full and not, in rows and in columns; every output channel of every pixel."""
    convolution(kernels, *case, dtype=dtype)


@pytest.mark.parametrize("channels", [96, 200])
def test_conv2d_in_any_order(channels, kernels):
    for seed in SEEDS:
        convolution(kernels, (1, 5, 7, 16), channels, seed=seed)


ROWS = [(1, 1), (200, 7), (257, 0), (0, 65), (128, 128)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_linear(rows, op, kernel, linear):
    """Both streams; depths and columns that no tile divides; samples that begin anywhere, and empty ones."""
    for dtype, (depth, columns), samples in ((torch.bfloat16, (136, 264), 3), (torch.float16, (64, 128), 1)):
        products(linear, op, kernel, rows, depth, columns, samples, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_to_six_problems(kernel, linear):
    rows = (130, 1, 300, 64, 65, 2)
    for count in range(1, 7):
        products(linear, "linear_qkv", kernel, rows[:count], 72, 136, processors=2 * count)


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_samples(kernel, linear):
    products(linear, "linear_gate_residual", kernel, (270, 33), 64, 256, samples=11)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_long_depth(kernel, linear):
    """Every stage of shared memory is used again, more than once."""
    products(linear, "linear_gelu", kernel, (140,), 1024, 264, processors=2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", LINEAR)
def test_linear_in_any_order(op, kernel, linear):
    for seed in SEEDS:
        products(linear, op, kernel, (140, 3), 264, 136, 2, seed=seed, processors=2)
