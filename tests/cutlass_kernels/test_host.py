"""The host's side of the kernels in csrc/cutlass_kernels: the order of tiles, and errors of the CUDA runtime."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from emulator.build import compiler, load

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    if compiler() is None:
        pytest.skip("needs g++ or clang++")
    program = tmp_path_factory.mktemp("tiles") / "tiles"
    subprocess.run([compiler(), "-std=c++17", "-O1", f"-I{CSRC}", HERE / "tiles.cpp", "-o", program], check=True)

    def run(tile_rows, tile_columns, columns, *rows):
        arguments = map(str, (tile_rows, tile_columns, columns, *rows))
        lines = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()
        return int(lines[0]), [tuple(map(int, line.split())) for line in lines[1:]]

    return run


@pytest.mark.parametrize(
    ("tile", "columns", "rows"),
    [
        ((128, 256), 3072, (8192, 80)), ((128, 128), 12288, (1024, 50)), ((256, 256), 3072, (13778,) * 3 + (80,) * 3),
        ((128, 128), 3080, (300, 0)), ((128, 128), 8, (0, 1)), ((128, 128), 3072, (0, 0)),
        ((128, 128), 640, (200, 200)), ((128, 128), 384, (1500, 1300, 1)),
    ],
)  # fmt: skip
def test_every_tile_once(order, tile, columns, rows):
    count, places = order(*tile, columns, *rows)
    assert count == sum(n > 0 for n in rows)
    expected = {
        (i, m, n)
        for i, height in enumerate(rows)
        for m in range(-(-height // tile[0]))
        for n in range(-(-columns // tile[1]))
    }
    assert len(places) == len(expected) and set(places) == expected


def test_small_problems_are_spread(order):
    """Any stretch of tiles has its share of text tiles, one at most more or less."""
    _, places = order(128, 256, 12288, 8192, 80)
    share = sum(p[0] == 1 for p in places) / len(places)
    for start in range(0, len(places) - 132, 40):
        count = sum(p[0] == 1 for p in places[start : start + 132])
        assert abs(count - 132 * share) <= 1


def test_neighbours_in_time_share_rows_and_columns(order):
    _, places = order(128, 256, 12288, 8192)
    for start in range(0, len(places), 64):
        chunk = places[start : start + 64]
        assert len({m for _, m, _ in chunk}) <= 8 and len({n for _, _, n in chunk}) <= 9


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the headers of a CUDA toolkit")


@needs_nvcc
def test_what_the_kernels_are_handed(tmp_path):
    """On Hopper its own kernels, elsewhere those of sm_80; every number in its place; errors as exceptions."""
    import pybind11

    includes = [f"-I{p}" for p in (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]
    target = tmp_path / f"bindings{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O0", "-Xcompiler=-fPIC", "-shared", "-cudart=none", *includes,
         "-DQIF_CUTLASS_SM80", "-DQIF_CUTLASS_SM90", CSRC / "bindings_cutlass.cpp", HERE / "bindings.cpp",
         "-o", target],
        check=True,
    )  # fmt: skip
    module = load(target)
    # x, weight, bias, out, rows, residual, gate, gate_stride, offsets, segments
    linears = [(1, 2, 3, 4, 50, 6, 7, 8, 9, 10), (11, 12, 13, 14, 0, 0, 0, 0, 0, 1)]
    given = ": 2 3072 12288 1 2; 1 2 3 4 6 7 9 50 8 10; 11 12 13 14 0 0 0 0 0 1"
    for op in ("linear_qkv", "linear_gelu", "linear_gate_residual"):
        launch = getattr(module, f"{op}_forward_cuda")
        for major, kernel in ((8, "sm80"), (9, "sm90"), (10, "sm80"), (12, "sm80")):
            module.be(major, 0)
            launch(linears, 3072, 12288, 1, 2, 0, 77)
            assert module.launched() == [f"{op}_{kernel} 77{given}"]
        module.be(9, 209)
        with pytest.raises(RuntimeError, match=f"^{op}: error 209$"):
            launch(linears, 3072, 12288, 1, 2, 0, 0)
    module.be(9, 0)
    products = [
        ((1, 2, 50, 64), (4, 5, 6, 7, 80), 8, (9, 10, 11, 12, 13)),
        ((1, 2, 3, 64), (4, 5, 6, 0, 8), 7, (0,) * 5),
    ]
    module.linear_int8_sm90_cuda(products, 2, 0, 77)
    given = " 1 2 4 5 6 7 8 9 10 12 50 80 64 11 13 2 0; 1 2 4 5 6 0 7 0 0 0 3 8 64 0 0 2 0;"
    assert module.launched() == [f"linear_int8_sm90 77:{given}"]
    module.be(9, 209)
    with pytest.raises(RuntimeError, match="^linear_int8: error 209$"):
        module.linear_int8_sm90_cuda(products, 2, 0, 0)


@needs_nvcc
def test_errors_of_the_runtime(tmp_path):
    """A GPU without kernels and a driver that is too old are explained; no error comes back at the next launch."""
    program = tmp_path / "errors"
    sources = [HERE / "errors.cpp", CSRC / "cuda_runtime.cu"]
    subprocess.run(
        ["nvcc", "-std=c++17", "-arch=sm_80", "-Xlinker=--wrap=cudaGetLastError", *sources, "-o", program],
        check=True, cwd=tmp_path,
    )  # fmt: skip

    def text(code):
        done = subprocess.run([program, str(code)], capture_output=True, text=True, check=True)
        words, forgotten = done.stdout.splitlines()
        assert forgotten == "1"
        return words

    assert "(cudaErrorNoKernelImageForDevice); the kernels were built for other GPUs: `qwen-image-fast" in text(209)
    assert "(cudaErrorInsufficientDriver); the driver must be at least as new as the CUDA toolkit" in text(35)
    assert text(2).endswith("(cudaErrorMemoryAllocation)")
