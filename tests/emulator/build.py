"""Compile the CUDA kernels for the emulator with the host's compiler, once for a state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATOR = Path(__file__).parent
CSRC = EMULATOR.parents[1] / "csrc"
RUNTIME = EMULATOR / "emulator.cpp"
MODULE = (EMULATOR / "module.cpp", CSRC / "bindings_cuda.cpp", *sorted((CSRC / "kernels").glob("*.cu")))
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer")


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(name: str, sources: tuple[Path, ...], cache: Path, flags: tuple[str, ...] = (), shared: bool = True) -> Path:
    """The library (or program) `name` of `sources` and the emulator, from `cache` where nothing changed."""
    sources = (*sources, RUNTIME)
    includes = [CSRC, EMULATOR]
    if shared:
        import pybind11

        includes += [Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    command = [compiler(), *FLAGS, *flags, "-DQIF_EMULATED", *(f"-I{i}" for i in includes)]
    headers = [p for root in (CSRC, EMULATOR) for p in root.rglob("*") if p.suffix in (".h", ".cuh")]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in (*sources, *sorted(headers)):
        digest.update(path.read_bytes())
    folder = cache / f"{name}-{digest.hexdigest()[:16]}"
    target = folder / (name + (sysconfig.get_config_var("EXT_SUFFIX") if shared else ""))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_all(command, sources, folder)
            link = [compiler(), *flags, *(["-shared"] if shared else []), *map(str, sorted(folder.glob("*.o")))]
            subprocess.run([*link, "-o", str(target) + ".part"], check=True)
            os.replace(str(target) + ".part", target)
    return target


def compile_all(command: list, sources: tuple[Path, ...], folder: Path) -> None:
    def one(source: Path) -> None:
        level = ["-O2"] if source == RUNTIME else []  # most of the time is spent there
        output = folder / f"{source.stem}.o"
        subprocess.run([*command, *level, "-x", "c++", "-c", str(source), "-o", str(output)], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, sources))


def load(path: Path):
    name = path.name.split(".")[0]
    spec = importlib.util.spec_from_file_location(
        name, path, loader=importlib.machinery.ExtensionFileLoader(name, str(path))
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
