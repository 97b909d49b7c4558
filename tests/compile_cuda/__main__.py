"""Compile every CUDA kernel for every GPU generation and hold what ptxas says against budget.json.

    python -m tests.compile_cuda            # check: fails on a spill, or more registers or shared memory than before
    python -m tests.compile_cuda --update   # write budget.json anew, for a change that is meant

Needs nvcc, no GPU and no torch; without nvcc it says so and succeeds. CUTLASS's headers are found or downloaded as by
the build (csrc/cutlass_kernels/find_headers.py). The host's object and the PTX of each file are kept for tests/ptx.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("budget.json")
OLDEST = (12, 8)  # of CUDA, which knows sm_100a
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a")
CUTLASS = ROOT / "csrc" / "cutlass_kernels"
CACHE = ROOT / "build" / "compile_cuda"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v", "-Xcompiler=-Wall,-fPIC,-fvisibility=hidden", "-Icsrc", "-c")

# kernel -> {"registers": n, "shared": bytes, "stack": bytes, "spills": bytes}
Usage = dict[str, dict[str, int]]


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*.cu"))


def architectures(source: Path) -> tuple[str, ...]:
    """What the build compiles a file for (cmake/cuda.cmake, cmake/cutlass.cmake)."""
    if source.stem.endswith("_sm90"):
        return tuple(a for a in ARCHITECTURES if a == "sm_90a")
    if source.stem.endswith("_sm89"):
        return tuple(a for a in ARCHITECTURES if a != "sm_80")
    asked = tuple(a for a in ARCHITECTURES if a != "sm_89")
    return tuple(a for a in asked if a != "sm_90a") if source.stem.endswith("_sm80") else asked


def headers(source: Path) -> list[Path]:
    """Ours that a file includes, itself or through others."""
    found, left = [], [source]
    while left:
        for name in re.findall(r'^#include "([\w./]+)"', left.pop().read_text(), re.M):
            path = ROOT / "csrc" / name
            if path.exists() and path not in found:
                found.append(path)
                left.append(path)
    return sorted(found)


def cutlass_flags(cache: Path) -> list[str]:
    found = subprocess.run(
        [sys.executable, str(CUTLASS / "find_headers.py"), str(cache)], check=True, stdout=subprocess.PIPE, text=True
    )
    return [f"-isystem={found.stdout.strip()}", "--expt-relaxed-constexpr"]


def find_nvcc() -> tuple[str | None, str]:
    """The compiler, or None and why."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None, "nvcc is not on the PATH"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    version = tuple(map(int, found.groups())) if found else (0, 0)
    if version < OLDEST:
        return None, "nvcc {}.{} is too old: these kernels need {}.{}".format(*version, *OLDEST)
    return nvcc, ""


def compile_one(nvcc: str, source: Path, cache: Path, more: list[str]) -> Path:
    """The folder in `cache` with what came of a file: `usage.json`, what ptxas says of each kernel per architecture,
    `object.o`, and `kernels.ptx` of sm_90a, of sm_80 where it is not for sm_90a. Compiled where a source changed."""
    flags = [*FLAGS, *(more if source.parent == CUTLASS else [])]
    digest = hashlib.sha256(" ".join((nvcc, *flags, *architectures(source))).encode())
    for path in (source, *headers(source)):
        digest.update(path.read_bytes())
    kept = cache / f"{source.stem}-{digest.hexdigest()[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{kept}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures(source)]
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder, "made")
                made.mkdir()
                command = [nvcc, *flags, *targets, str(source.relative_to(ROOT)), "-o", str(made / "object.o")]
                done = subprocess.run(
                    [*command, "--keep", f"--keep-dir={folder}"], cwd=ROOT, capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
                (made / "usage.json").write_text(json.dumps(parse(done.stdout + done.stderr)))
                interpreted = "sm_90a" if "sm_90a" in architectures(source) else "sm_80"
                for ptx in Path(folder).glob("*.ptx"):
                    if f".target {interpreted}\n" in ptx.read_text():
                        os.replace(ptx, made / "kernels.ptx")
                os.replace(made, kept)
    return kept


def parse(log: str) -> dict[str, Usage]:
    """The usage of each kernel per architecture, from the words of `ptxas -v`."""
    found: dict[str, Usage] = {}
    kernel: dict[str, int] = {}
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, architecture = entry.groups()
            kernel = {"registers": 0, "shared": 0, "stack": 0, "spills": 0}
            found.setdefault(architecture, {})[name] = kernel
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel["stack"], kernel["spills"] = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel["shared"] = int(shared[1]) if shared else 0
    names = demangle({name for usage in found.values() for name in usage})
    return {a: {names[n]: u for n, u in sorted(usage.items())} for a, usage in found.items()}


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Readable kernel names without namespaces and arguments: layer_norm_modulate_rows<BFloat16, 8, 12>."""
    names, tool = sorted(names), shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {n: n for n in names}
    lines = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {n: shorten(line) for n, line in zip(names, lines)}


def shorten(name: str) -> str:
    name = re.sub(r"\((?:int|bool|qif::LinearEpilogue)\)", "", name.removeprefix("void "))
    name = re.sub(r"\b(?:qif|gpu|gemm|cutlass)::", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def complaints(measured: dict[str, Usage], budget: dict[str, dict[str, list[int]]]) -> list[str]:
    found = []
    for architecture, usage in measured.items():
        allowed = budget.get(architecture, {})
        for kernel, u in usage.items():
            what = f"{kernel} for {architecture}"
            if u["spills"] or u["stack"]:
                found.append(f"{what}: spills {u['spills']} bytes, stack {u['stack']} bytes; both must be 0")
            if kernel not in allowed:
                found.append(f"{what}: not in the budget; add it with --update")
                continue
            for name, limit in zip(("registers", "shared"), allowed[kernel]):
                if u[name] > limit:
                    found.append(f"{what}: {u[name]} {name}, budget {limit}")
        found += [f"{k} for {architecture}: in the budget, but not compiled" for k in allowed.keys() - usage.keys()]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write budget.json from what was measured")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    nvcc, reason = find_nvcc()
    if nvcc is None:
        print(f"compile_cuda: skipped, {reason}")
        return 0
    measured: dict[str, Usage] = {a: {} for a in ARCHITECTURES}
    more = cutlass_flags(options.cache) if any(CUTLASS.glob("*.cu")) else []
    with ThreadPoolExecutor(options.jobs) as pool:
        for folder in pool.map(lambda s: compile_one(nvcc, s, options.cache, more), sources()):
            usage = json.loads((folder / "usage.json").read_text())
            for architecture, kernels in usage.items():
                measured[architecture].update(kernels)
    if options.update:
        budget = {a: {k: [u["registers"], u["shared"]] for k, u in sorted(m.items())} for a, m in measured.items()}
        text = re.sub(r"\[\n\s+(\d+),\n\s+(\d+)\n\s+\]", r"[\1, \2]", json.dumps(budget, indent=1))
        BUDGET.write_text(text + "\n")
    budget = json.loads(BUDGET.read_text())
    problems = complaints(measured, budget)
    for problem in problems:
        print(f"compile_cuda: {problem}", file=sys.stderr)
    if not problems:
        counts = ", ".join(f"{len(kernels)} for {architecture}" for architecture, kernels in measured.items())
        print(f"compile_cuda: {counts}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
