"""The build is configured with and without CUDA, and its description is in reach of `make` and short."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]


def configured(folder, *options):
    """CMake's cache of a configuration, which is made as scikit-build-core makes it; nothing is compiled."""
    run = subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-DSKBUILD_PROJECT_VERSION=0.1.0", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return (folder / "CMakeCache.txt").read_text()


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs CMake")
def test_configure_without_cuda(tmp_path):
    configured(tmp_path, "-DQIF_CUDA=OFF")
    assert not list(tmp_path.rglob("*_cuda.dir"))


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("nvcc")), reason="needs CMake and nvcc")
def test_configure_for_cuda(tmp_path):
    """By the option that the documentation names, and nothing else; the headers of CUTLASS are not read for it."""
    configured(tmp_path, "-DQIF_CUDA=ON", f"-DQIF_CUTLASS_INCLUDE={tmp_path}")
    for library in ("kernels_cuda", "cutlass_SM90", "cutlass_SM80", "cutlass_ALL"):
        assert (tmp_path / "CMakeFiles" / f"{library}.dir").is_dir(), library


def test_the_parts_of_the_description():
    top = (ROOT / "CMakeLists.txt").read_text()
    parts = sorted((ROOT / "cmake").glob("*.cmake"))
    included = set(
        re.findall(r"^ *include\((cmake/\w+\.cmake)\)$", "".join([top, *(p.read_text() for p in parts)]), re.M)
    )
    assert included == {str(p.relative_to(ROOT)) for p in parts} and len(included) == 5
    assert all(len(p.read_text().splitlines()) < 100 for p in (ROOT / "CMakeLists.txt", *parts))
    assert "$(wildcard cmake/*.cmake)" in (ROOT / "Makefile").read_text()
