"""Faults planted in the PTX that nvcc made, a kind each: every one is caught, with words that name it."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from ptx.cases import cancelling_product, fp8_product, int8_product, products
from qwen_image_fast import doctor
from qwen_image_fast.ops import int8_kernels, int8_rows, linear_int8
from qwen_image_fast.ops.int8_rows import int8_rows_reference
from qwen_image_fast.ops.linear_int8 import linear_int8_reference


def plant(text: str, kernel: str, pattern: str, replacement: str, which: int | None = 0) -> str:
    """The PTX with match number `which` of `pattern`, None for all, replaced in the kernels that `kernel` matches."""
    found = 0
    parts = re.split(r"^(?=(?:\.visible |\.weak )?\.entry )", text, flags=re.M)
    for n, part in enumerate(parts):
        if n == 0 or not re.search(kernel, part[: part.index("(")]):
            continue
        matches = list(re.finditer(pattern, part, re.M))
        for m in reversed(matches if which is None else matches[which : which + 1]):
            part = part[: m.start()] + m.expand(replacement) + part[m.end() :]
            found += 1
        parts[n] = part
    assert found, f"nothing matches {pattern}"
    return "".join(parts)


def judge(op: str, rows: int, width: int):
    def run(device, seed: int) -> None:
        device.module.be(seed=seed, step_limit=1 << 22)
        verdict = doctor._judge(op, "interpreted", "cpu", torch.bfloat16, rows, width)
        if verdict.problem:
            raise RuntimeError(verdict.problem)

    return run


def linear_case(op: str, kernel: str):
    def run(device, seed: int) -> None:
        products(device, op, kernel, (140,), 584, 264, seed=seed, processors=2)

    return run


def int8_case(device, seed: int, make: Callable = int8_product) -> None:
    device.module.be(seed=seed, step_limit=1 << 22)
    rows, weight, bias = make(20, 464, 20, torch.bfloat16)
    found = linear_int8([rows], [weight], [bias], torch.bfloat16)[0]
    assert torch.equal(found, linear_int8_reference([rows], [weight], [bias], torch.bfloat16)[0])


def fp8_case(device, seed: int) -> None:
    int8_case(device, seed, fp8_product)


def fp8_rows_case(device, seed: int) -> None:
    device.module.be(seed=seed, step_limit=1 << 22)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = int8_rows(x, 16, float8=True), int8_rows_reference(x, 16, float8=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.float(), theirs.float())


def hopper_case(device, seed: int, make: Callable = int8_product) -> None:
    device.module.be(seed=seed, step_limit=1 << 24, processors=2)
    rows, weight, bias = make(140, 1168, 264, torch.bfloat16)
    with int8_kernels("wgmma"):
        found = linear_int8([rows], [weight], [bias], torch.bfloat16)[0]
    assert torch.equal(found, linear_int8_reference([rows], [weight], [bias], torch.bfloat16)[0])


def cancelling_case(device, seed: int) -> None:
    hopper_case(device, seed, cancelling_product)


NORM, GELU = judge("layer_norm_modulate", 21, 1024), judge("gelu_tanh", 5, 100)
ATTENTION = judge("joint_attention", 450, 64)
GATE90, GELU90 = (linear_case(op, "sm_90a large") for op in ("linear_gate_residual", "linear_gelu"))
SMALL90, GELU80 = linear_case("linear_gelu", "sm_90a small"), linear_case("linear_gelu", "sm_80")


# What is not ordered is read before it was written, or with nothing that says so, as the order of threads has it.
UNORDERED = "race: shared byte|shared byte .* was never written"


class Fault(NamedTuple):
    source: str
    pattern: str
    replacement: str
    call: Callable
    words: str  # of what is said
    which: int | None = None
    kernel: str = "BFloat16|bfloat16"


OWN = {
    "barrier missing": Fault("layer_norm_modulate_cuda", r"bar\.sync\s+0;", "", NORM, UNORDERED),
    "barrier for more threads": Fault(
        "layer_norm_modulate_cuda",
        r"bar\.sync\s+0;",
        "bar.sync 0, 992;",
        NORM,
        r"barrier 0 is for 992 threads, the block has \d+",
    ),
    "barrier for fewer threads": Fault(
        "layer_norm_modulate_cuda", r"bar\.sync\s+0;", "bar.sync 0, 32;", NORM, UNORDERED
    ),
    "barrier of two counts": Fault(
        "layer_norm_modulate_cuda",
        r"bar\.sync\s+0;",
        "{.reg .b32 n; and.b32 n, %tid.x, 32; add.s32 n, n, 64; bar.sync 0, n;}",
        NORM,
        r"is for \d+ threads here, for \d+ where other threads wait|nothing can go on|" + UNORDERED,
    ),
    "warp barrier missing": Fault("joint_attention_cuda", r"bar\.warp\.sync\s+-1;", "", ATTENTION, "race: shared byte"),
    "shuffle of half a warp": Fault(
        "layer_norm_modulate_cuda",
        r"(shfl\.sync\.bfly\.b32.*), %r\d+;",
        r"\1, 65535;",
        NORM,
        "the mask misses the calling lane",
    ),
    "shared memory not written": Fault(
        "layer_norm_modulate_cuda", r"^(.*st\.shared)", r"//\1", NORM, "shared byte .* was never written"
    ),
    "shared memory past its end": Fault(
        "layer_norm_modulate_cuda",
        r"(st\.shared\.\S+\s+\[%r\d+)(\+\d+)?\]",
        r"\1+99000]",
        NORM,
        "outside of the block's",
        0,
    ),
    "global memory not written": Fault(
        "layer_norm_modulate_cuda",
        r"^(.*st\.global)",
        r"//\1",
        NORM,
        "global byte .* was never written",
        kernel="layer_norm_modulate_chunk.*BFloat16",
    ),
    "elements past the last": Fault("gelu_tanh_cuda", r"^\s*@%p1 bra.*;$", "", GELU, "outside of every tensor"),
    "threads on one element": Fault(
        "gelu_tanh_cuda", r"(mov\.u32\s+%r\d+), %tid\.x;", r"\1, 0;", GELU, "race: global byte .* is written"
    ),
    "misaligned": Fault(
        "gelu_tanh_cuda", r"(ld\.global\.v4\.u32.*)\[(%rd\d+)\]", r"\1[\2+2]", GELU, "misaligned read of 16 bytes"
    ),
    "never ends": Fault(
        "gelu_tanh_cuda", r"^\s*ret;$", "$L__again:\nbra.uni $L__again;", GELU, "has not ended within its limit"
    ),
    "cp.async not waited for": Fault(
        "joint_attention_cuda", r"cp\.async\.wait_group \d+;", "", ATTENTION, "race: shared byte .* by a cp.async"
    ),
    "cp.async of another group": Fault(
        "joint_attention_cuda",
        r"cp\.async\.wait_group 1;",
        "cp.async.wait_group 2;",
        ATTENTION,
        "by a cp.async|before its cp.async",
    ),
    "8-bit tiles of another group": Fault(
        "linear_int8_cuda", r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;", int8_case, "by a cp.async"
    ),
    "8-bit tiles of other threads": Fault("linear_int8_cuda", r"bar\.sync\s+0;", "", int8_case, UNORDERED),
    "float8 numbers exchanged": Fault(
        "int8_rows_cuda",
        r"(cvt\.rn\.satfinite\.e4m3x2\.f32\s+%rs\d+), (%f\d+), (%f\d+);",
        r"\1, \3, \2;",
        fp8_rows_case,
        "assert",
    ),
    "float8 multiplied as integers": Fault(
        "linear_fp8_sm89", r"f32\.e4m3\.e4m3\.f32", "s32.u8.s8.s32", fp8_case, "assert"
    ),
    "float8 fragments of the wrong depth": Fault(
        "linear_fp8_sm89", r"(e4m3\.f32 \{.*\}, )\{(%r\d+), (%r\d+)\}, \{", r"\1{\3, \2}, {", fp8_case, "assert"
    ),
    "float8 tiles of another group": Fault(
        "linear_fp8_sm89", r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;", fp8_case, "by a cp.async"
    ),
    "an operation nobody knows": Fault(
        "gelu_tanh_cuda", r"ex2\.approx", "ex3.approx", GELU, r"line \d+ of \S+: `ex3.approx.f32` is not known", 0
    ),
}
LINEAR = {
    "cp.async one group late": Fault(
        "linear_gelu_sm80", r"cp\.async\.wait_group 2;", "cp.async.wait_group 3;", GELU80, "by a cp.async"
    ),
    "cp.async not committed": Fault("linear_gelu_sm80", r"cp\.async\.commit_group;", "", GELU80, "by a cp.async"),
    "stage used again too early": Fault("linear_gelu_sm80", r"bar\.sync\s+0;", "", GELU80, "race: shared byte", 1),
    "wgmma not waited for": Fault(
        "linear_gelu_sm90",
        r"wgmma\.wait_group\.sync\.aligned \d;",
        "",
        GELU90,
        "before the wgmma that has it|after its read by a wgmma",
    ),
    "wgmma waited for too late": Fault(
        "linear_gelu_sm90",
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "wgmma.wait_group.sync.aligned 7;",
        GELU90,
        "after its read by a wgmma",
    ),
    "wgmma without a fence": Fault("linear_gelu_sm90", r"wgmma\.fence\.sync\.aligned;", "", GELU90, "no wgmma.fence"),
    "proxy fence missing": Fault(
        "linear_gelu_sm90", r"fence\.proxy\.async\.shared::cta;", "", GELU90, "no fence.proxy.async follows"
    ),
    "store's reads not waited for": Fault(
        "linear_gelu_sm90",
        r"cp\.async\.bulk\.wait_group\.read \d;",
        "cp.async.bulk.wait_group.read 9;",
        GELU90,
        "after its read by a bulk store",
    ),
    "stores not waited for": Fault(
        "linear_gelu_sm90", r"cp\.async\.bulk\.wait_group\.read 0;", "", GELU90, "before its bulk stores"
    ),
    "fewer bytes expected": Fault(
        "linear_gelu_sm90",
        r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\]), %r\d+;",
        r"\1, 16384;",
        GELU90,
        "fewer bytes were expected",
    ),
    "more bytes expected": Fault(
        "linear_gelu_sm90",
        r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\]), %r\d+;",
        r"\1, 65536;",
        GELU90,
        r"nothing can go on: .* of block \d+ \(\d+ threads\) waits at line \d+, mbarrier.try_wait",
    ),
    "an arrival too many": Fault(
        "linear_gelu_sm90", r"(mbarrier\.init\S* \[%r\d+\]), %r\d+;", r"\1, 3;", GELU90, "nothing can go on", 0
    ),
    "an arrival too few": Fault(
        "linear_gelu_sm90",
        r"(mbarrier\.init\S* \[%r\d+\]), %r\d+;",
        r"\1, 1;",
        GELU90,
        "after its read by a wgmma|arrivals and waits|more arrivals than",
        1,
    ),
    "copies to one block alone": Fault(
        "linear_gelu_sm90", r"(multicast::cluster.*\]), %rs\d+, ", r"\1, 1, ", GELU90, "nothing can go on"
    ),
    "mbarriers not fenced": Fault(
        "linear_gelu_sm90", r"fence\.mbarrier_init\.release\.cluster;", "", GELU90, "the initialisation of the mbarrier"
    ),
    "cluster barrier by halves": Fault(
        "linear_gelu_sm90",
        r"barrier\.cluster\.wait\.aligned;",
        "barrier.cluster.arrive.relaxed.aligned;",
        GELU90,
        "arrives twice",
    ),
    "cluster not waited for": Fault(
        "linear_gelu_sm90",
        r"barrier\.cluster\.wait\.aligned;",
        "",
        GELU90,
        "mbarrier was initialised|initialisation of the",
    ),
    "named barrier of another count": Fault(
        "linear_gelu_sm90",
        r"(bar\.sync\s+%r\d+), %r\d+;",
        r"\1, 96;",
        GELU90,
        "race|never written|nothing can go on|comes to barrier",
    ),
    "data not waited for": Fault(
        "linear_gelu_small_sm90", r"mbarrier\.try_wait\S* P1, .*;", "mov.pred P1, -1;", SMALL90, "race|more arrivals"
    ),
    "8-bit wgmma waited for too late": Fault(
        "linear_int8_sm90",
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "wgmma.wait_group.sync.aligned 7;",
        hopper_case,
        "after its read by a wgmma",
    ),
    "8-bit sums read too early": Fault(
        "linear_int8_sm90",
        r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;",
        hopper_case,
        "before the wgmma that has it",
    ),
    "8-bit products contracted": Fault(
        "linear_int8_sm90",
        r"mul\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+);\s+add\.rn\.f32\s+(%f\d+), \1, (%f\d+);",
        r"fma.rn.f32 \4, \2, \3, \5;",
        cancelling_case,
        "assert",
    ),
    "residual not waited for": Fault(
        "linear_gate_residual_sm90",
        r"mbarrier\.expect_tx\S* \[%r\d+\], %r\d+;",
        "",
        GATE90,
        "arrives when the phase|nothing can go on|nothing orders that after its write by a bulk copy",
    ),
}


def check(device, fault: Fault) -> None:
    changed = plant(device.ptx[fault.source], fault.kernel, fault.pattern, fault.replacement, fault.which)
    device.use(**{fault.source: changed})
    for seed in (1, 2, 3):
        with pytest.raises((RuntimeError, AssertionError), match=fault.words):
            fault.call(device, seed)
    device.use()
    fault.call(device, 1)


@pytest.mark.parametrize("fault", OWN)
def test_in_our_kernels(fault, kernels):
    check(kernels, OWN[fault])


@pytest.mark.parametrize("fault", LINEAR)
def test_in_the_linear_layers(fault, linear):
    check(linear, LINEAR[fault])
