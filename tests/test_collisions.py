"""Beside other libraries and in other processes: the same bits, and what the doctor says of what collides."""

import inspect
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwen_image_fast
from qwen_image_fast import doctor, doctor_libraries

PATHS = os.pathsep.join([str(Path(qwen_image_fast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
FIRST = {
    "torch": "import torch, qwen_image_fast",
    "this package": "import qwen_image_fast; qwen_image_fast.build_info(); import torch",
    "numpy's products": "import numpy; (numpy.ones((512, 512)) @ numpy.ones((512, 512))).sum(); import qwen_image_fast",
}


def work(threads):
    """What several threads made, in torch's kernels and in ours."""
    import hashlib

    import torch

    from qwen_image_fast import ops

    torch.set_num_threads(threads)
    x = torch.sin(torch.arange(600 * 256, dtype=torch.float32)).reshape(600, 256)
    x = ops.gelu_tanh(torch.exp(x) - x * x[0])
    return hashlib.sha256(x.view(torch.uint8).numpy()).hexdigest()


WORK = inspect.getsource(work)


def in_new_process(code, **variables):
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "2", **variables}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.fixture(scope="module")
def expected():
    before = torch.get_num_threads()
    yield work(2)
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", FIRST)
def test_whatever_is_imported_first(first, expected):
    runtimes = "from qwen_image_fast import doctor_libraries; print(doctor_libraries.openmp().replace(' ', '_'))"
    bits, runtime = in_new_process(f"{FIRST[first]}\n{WORK}\nprint(work(2))\n{runtimes}")
    assert bits == expected
    if sys.platform == "linux":
        assert re.search(r"^/[^,]*lib(gomp|iomp5|omp)[^/,]*$", runtime), runtime  # one


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_in_processes_started_from_here(way, expected):
    """After the threads of this one have worked: a fork has none of them and asks for one, as torch's loaders do."""
    if way not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {way} here")
    with multiprocessing.get_context(way).Pool(1) as pool:
        assert pool.apply_async(work, (1 if way == "fork" else 2,)).get(timeout=300) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's variable is Linux's")
def test_another_cuda_runtime_is_not_loaded_and_is_named(tmp_path, monkeypatch, expected):
    """The module asks for no libcudart: what would be no library at all changes nothing."""
    (tmp_path / "libcudart.so.12").write_bytes(b"no library")
    (tmp_path / "libother.so.1").touch()
    said = in_new_process(
        f"{WORK}\nprint(work(2))\nprint(open('/proc/self/maps').read())",
        LD_LIBRARY_PATH=f"{tmp_path}:{tmp_path / 'none'}",
    )
    assert said[0] == expected and str(tmp_path / "libcudart.so.12") not in said
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:{tmp_path / 'none'}")
    assert doctor.environment()["libraries"] == (
        f"LD_LIBRARY_PATH puts {tmp_path / 'libcudart.so.12'} before torch's own: unset it if torch fails to load "
        "or to compute"
    )
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert doctor.environment()["libraries"] == "LD_LIBRARY_PATH names none of torch's"


@pytest.mark.parametrize(
    ("loaded", "says"),
    [
        ([], "none is loaded"),
        (["/a b/libgomp-a34b3233.so.1", "/a b/libgomp-a34b3233.so.1", "/x/libcomp.so.1"], "/a b/libgomp-a34b3233.so.1"),
        (["/t/libgomp.so.1", "/m/libiomp5.so"], "2 runtimes in one process: /m/libiomp5.so, /t/libgomp.so.1; each has"),
        (["/t/libgomp.so.1.0.0", "/l/libomp.so", "/m/libiomp5.so"], "3 runtimes in one process: /l/libomp.so, /m/"),
    ],
)
def test_runtimes_of_openmp_that_meet(loaded, says, tmp_path, monkeypatch):
    lines = ["7f00-7f01 r-xp 00000000 fe:00 12      [stack]", *(f"7f00-7f01 r-xp 0000 fe:00 12    {f}" for f in loaded)]
    monkeypatch.setattr(doctor_libraries, "MAPS", tmp_path / "maps")
    assert doctor.environment()["OpenMP"] == "what is loaded is not known on this system"
    (tmp_path / "maps").write_text("\n".join(lines) + "\n")
    assert doctor.environment()["OpenMP"].startswith(says)
