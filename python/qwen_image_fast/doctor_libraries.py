"""Shared libraries that get in each other's way: OpenMP's runtimes of this process, CUDA's of LD_LIBRARY_PATH."""

from __future__ import annotations

import os
import re
from pathlib import Path

# GNU's, Intel's (of MKL, and of conda) and LLVM's; torch's wheels rename theirs, as libgomp-a34b3233.so.1.
OPENMP = re.compile(r"lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.so[\d.]*$")
OF_TORCH = re.compile(r"lib(cudart|cublas|cublasLt|cudnn|nccl|nvrtc|gomp|iomp5|omp)\.so[\d.]*$")
MAPS = Path("/proc/self/maps")


def openmp() -> str:
    """Which runtimes are loaded; with more than one, what that means."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "what is loaded is not known on this system"
    files = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    found = sorted(file for file in files if OPENMP.search(file))
    if len(found) < 2:
        return found[0] if found else "none is loaded"
    return (
        f"{len(found)} runtimes in one process: {', '.join(found)}; each has threads of its own, which take each "
        "other's processors: import torch first, and if they stay, set OMP_NUM_THREADS for all of them"
    )


def search_path() -> str:
    """Libraries that LD_LIBRARY_PATH puts before those that torch brings; this package links CUDA's runtime inside."""
    found = []
    for folder in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        try:
            found += sorted(str(file) for file in Path(folder).iterdir() if OF_TORCH.search(file.name))
        except OSError:
            continue  # the loader passes over it too
    if not found:
        return "LD_LIBRARY_PATH names none of torch's"
    return f"LD_LIBRARY_PATH puts {', '.join(found)} before torch's own: unset it if torch fails to load or to compute"
