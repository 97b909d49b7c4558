"""The checker of the compile budget: what it reads from ptxas, and what it complains of."""

import os
import re
import subprocess
import sys

from compile_cuda.__main__ import (
    ARCHITECTURES,
    BUDGET,
    CUTLASS,
    ROOT,
    architectures,
    complaints,
    headers,
    parse,
    shorten,
)

LOG = """\
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_80'
ptxas info    : Function properties for _Z3addPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90a'
ptxas info    : Function properties for _Z3addPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def only_name(usage):
    ((name, values),) = usage.items()
    assert name.endswith("add") or name == "_Z3addPf"
    return name, values


def test_parse():
    usage = parse(LOG)
    assert only_name(usage["sm_80"])[1] == {"registers": 32, "shared": 256, "stack": 0, "spills": 0}
    assert only_name(usage["sm_90a"])[1] == {"registers": 40, "shared": 0, "stack": 16, "spills": 12}


def test_names():
    long = "void qif::gpu::rows<qif::BFloat16, (int)8, (bool)1>(qif::Params, float *)"
    assert shorten(long) == "rows<BFloat16, 8, 1>"
    long = "void cutlass::device_kernel<qif::gemm::LinearSm90<(qif::LinearEpilogue)1, cutlass::half_t, (int)2, "
    long += "qif::gemm::LargeTile>>(T1::Params)"
    assert shorten(long) == "device_kernel<LinearSm90<1, half_t, 2, LargeTile>>"


def test_complaints():
    usage = parse(LOG)
    name, _ = only_name(usage["sm_80"])
    fine = {"sm_80": usage["sm_80"]}
    assert complaints(fine, {"sm_80": {name: [32, 256]}}) == []
    assert complaints(fine, {"sm_80": {name: [40, 512]}}) == []
    assert complaints(fine, {"sm_80": {name: [31, 256]}}) == [f"{name} for sm_80: 32 registers, budget 31"]
    assert complaints(fine, {"sm_80": {name: [32, 0]}}) == [f"{name} for sm_80: 256 shared, budget 0"]
    assert "not in the budget" in complaints(fine, {})[0]
    assert "not compiled" in complaints(fine, {"sm_80": {name: [32, 256], "gone": [1, 0]}})[0]
    (spill,) = complaints({"sm_90a": usage["sm_90a"]}, {"sm_90a": {name: [40, 0]}})
    assert "spills 12 bytes, stack 16 bytes" in spill


def test_every_op_has_a_budget():
    text = BUDGET.read_text()
    for kernel in sorted((ROOT / "csrc" / "kernels").glob("*_cuda.cu")):
        op = re.sub("(_forward|_backward|_delta)?_cuda$", "", kernel.stem)
        assert f'"{op}_' in text
    for kernels in ("LinearSm80<", "LinearSm90<"):
        assert all(f"{kernels}{epilogue}, " in text for epilogue in range(3))


def test_what_a_source_is_compiled_for():
    folder = ROOT / "csrc" / "cutlass_kernels"
    assert architectures(folder / "x_sm90.cu") == ("sm_90a",)
    assert architectures(folder / "x_sm80.cu") == ("sm_80", "sm_100a")
    assert architectures(folder / "x_sm89.cu") == ("sm_89", "sm_90a", "sm_100a")
    assert architectures(folder / "x.cu") == ("sm_80", "sm_90a", "sm_100a")
    assert set(ARCHITECTURES) == {"sm_80", "sm_89", "sm_90a", "sm_100a"}


def test_headers_through_others():
    names = {p.name for p in headers(ROOT / "csrc" / "kernels" / "gelu_tanh_cuda.cu")}
    assert {"gelu_tanh.h", "cuda.cuh", "dtype.h", "segments.h"} <= names and "norm_row.cuh" not in names


def test_cutlass_headers_of_an_installed_package(tmp_path):
    """Found without importing the package, whose own dependencies are not installed."""
    include = tmp_path / "cutlass_library" / "source" / "include"
    (include / "cutlass").mkdir(parents=True)
    (include / "cutlass" / "cutlass.h").touch()
    (tmp_path / "cutlass_library" / "__init__.py").write_text("raise ImportError")
    found = subprocess.run(
        [sys.executable, CUTLASS / "find_headers.py", tmp_path / "cache"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(include) and not (tmp_path / "cache").exists()
