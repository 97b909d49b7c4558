"""What the interpreter is not for is one sentence."""

import os

import pytest
from compile_cuda import __main__ as compile_cuda

from ptx.cases import products

HEADER = ".version {}\n.target {}\n.address_size 64\n"


@pytest.mark.parametrize(
    ("version", "target", "words"),
    [
        ("7.8", "sm_80", "PTX of version 7.8: versions 8 and 9 are modelled, of CUDA 12 and 13"),
        ("12.0", "sm_80", "PTX of version 12.0: versions 8"),
        ("9.0", "sm_100a", "PTX for sm_100a: sm_80 and sm_90a are modelled"),
        ("9.0", "sm_75", "PTX for sm_75: sm_80"),
    ],
)
def test_another_version_or_gpu(version, target, words, kernels):
    with pytest.raises(RuntimeError, match=f"^{words}"):
        kernels.module.set_programs(["\n" + HEADER.format(version, target)])


def test_no_ptx(linear):
    linear.module.set_programs([])
    with pytest.raises(RuntimeError, match="^linear_qkv: no PTX of _Z"):
        products(linear, "linear_qkv", "sm_80", (1,), 64, 64)


def test_a_tensor_that_no_tensor_map_takes(linear, capfd):
    """The driver's refusal is an error; CUTLASS alone would launch with a map of zeros."""
    import torch

    x = torch.randn(2, 72).bfloat16()
    out = torch.empty(2, 8, dtype=torch.bfloat16)
    shifted = [(x.data_ptr() + 2, x.data_ptr(), x.data_ptr(), out.data_ptr(), 1, 0, 0, 0, 0, 1)]
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: the tensor must be aligned to 16 bytes$"):
        linear.launch("linear_gelu_forward", x, shifted, 8, 64, 0, 2)
    capfd.readouterr()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "nvcc is not on the PATH"),
        ("Cuda compilation tools, release 11.8, V11.8.89", "nvcc 11.8 is too old: these kernels need 12.8"),
        ("what?", "nvcc 0.0 is too old: these kernels need 12.8"),
    ],
)
def test_nvcc(answer, words, tmp_path, monkeypatch):
    if answer is not None:
        (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '{answer}'\n")
        os.chmod(tmp_path / "nvcc", 0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert compile_cuda.find_nvcc() == (None, words)
    assert compile_cuda.main([]) == 0


def test_it_stays_small():
    from ptx import build

    lines = [len(p.read_text().splitlines()) for p in build.HERE.glob("*.[ch]*")]
    assert max(lines) < 400 and sum(lines) < 2520, (max(lines), sum(lines))
