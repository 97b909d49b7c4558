"""Link the interpreter with the host code of CUDA kernels, once for a state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pybind11
from compile_cuda.__main__ import CACHE, CUTLASS, ROOT, compile_one, cutlass_flags, find_nvcc, sources
from emulator.build import load

HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
FLAGS = ("-std=c++17", "-O2", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-fno-math-errno", f"-I{CSRC}", f"-I{HERE}")
# Modules by name: which sources they hold, the file with their bindings and what that is compiled with.
MODULES = {
    "kernels": (lambda s: s.parent != CUTLASS or s.stem == "conv2d", "bindings_cuda.cpp", ["QIF_CUTLASS_ALL"]),
    "linear": (
        lambda s: s.parent == CUTLASS and s.stem != "conv2d",
        "bindings_cutlass.cpp",
        ["QIF_CUTLASS_SM80", "QIF_CUTLASS_SM90"],
    ),
}  # fmt: skip


def module(name: str, cache: Path) -> tuple[Any, dict[str, str]]:
    """The Python module, and the PTX of its sources by their names."""
    nvcc, reason = find_nvcc()
    assert nvcc, reason
    chosen, bindings, definitions = MODULES[name]
    picked = [s for s in sources() if chosen(s) and s.stem != "cuda_runtime"]
    more = cutlass_flags(CACHE)
    compiled = [compile_one(nvcc, s, CACHE, more) for s in picked]  # one takes 3.5 GB; each test process may be here
    full = f"_C_ptx_{name}"
    interpreter = objects("interpreter", [nvcc, *FLAGS], [s for s in HERE.glob("*.cpp") if s.stem != "module"], cache)
    defined = [f"-D{d}" for d in (f"PTX_MODULE={full}", *definitions)]
    includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    own = objects(name, [nvcc, *FLAGS, *defined, *includes], [HERE / "module.cpp", CSRC / bindings], cache)
    parts = [*interpreter, *own, *(c / "object.o" for c in compiled)]
    digest = hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()
    target = cache / f"{name}-linked-{digest[:16]}" / f"{full}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with locked(target.parent):
        if not target.exists():
            link = [os.environ.get("CXX", "g++"), "-shared", *map(str, parts), "-o", f"{target}.part"]
            subprocess.run(link, check=True)
            os.replace(f"{target}.part", target)
    return load(target), {s.stem: (c / "kernels.ptx").read_text() for s, c in zip(picked, compiled)}


def objects(name: str, command: list[str], picked: list[Path], cache: Path) -> list[Path]:
    """The object files of some sources, from `cache` where nothing changed."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in (*sorted(picked), *sorted(HERE.glob("*.h")), *sorted(CSRC.rglob("*.h"))):
        digest.update(path.read_bytes())
    folder = cache / f"{name}-{digest.hexdigest()[:16]}"
    made = [folder / f"{s.stem}.o" for s in sorted(picked)]

    def compile_source(source: Path, target: Path) -> None:
        if not target.exists():
            subprocess.run([*command, "-c", str(source), "-o", f"{target}.part.o"], check=True)
            os.replace(f"{target}.part.o", target)

    with locked(folder), ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_source, sorted(picked), made))
    return made


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
