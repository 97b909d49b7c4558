"""Build for the GPU of this machine, test, sanitize and measure: `make gpu-check`, in under nine minutes, offline.

Needs nvcc, a CUDA torch and what the package depends on; what is missing of the latter is taken from `gpu-wheels/`
(`make gpu-wheels`). Every stage has a time budget; the results file is rewritten after each, and a failed
stage does not keep the next from running.

    python -m benchmarks.gpu_check [stage ...] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
RESULTS = Path(__file__).parent / "results"
TAIL = 6000  # characters of a failed stage's output that the results keep

# The CUDA cases of the op tests; the sanitizer slows them down a hundredfold, so it gets one dtype and some shapes.
OP_TESTS = ("tests/ops", "-k", "cuda and not emulated and not test_library")
SANITIZED = (
    "tests/ops", "tests/gpu/test_linear_gpu.py", "-k",
    "(cuda and not emulated and (test_accuracy or other_widths or misaligned or fp8_rows) and bfloat16)"
    " or equal_segments",
)  # fmt: skip


@dataclass
class Stage:
    """`seconds` is a limit, after which the stage is stopped; `run` returns what the results say of it.

    `shows`: what is known of a GPU once it has passed there (docs/gpu-status.md lists what is not).
    """

    name: str
    seconds: int
    run: Callable[[Check], dict[str, Any]]
    shows: str = ""


class Failed(Exception):
    pass


class Check:
    def __init__(self, output: Path, add: bool = False):
        """`add`: keep what the results file of this day and GPU says of other stages."""
        self.output, self.add = output, add
        self.results: dict[str, Any] = {"date": datetime.date.today().isoformat(), "stages": {}}
        self.file: Path | None = None
        self.limit = 0.0

    # ---- processes ----------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT / "python"), str(ROOT), *([str(SITE)] if SITE.exists() else [])]
        # The tests ask torch for deterministic algorithms, which cuBLAS only has with a fixed workspace.
        fixed = {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
        programs = [str(SITE / "bin"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        return {**os.environ, "PATH": os.pathsep.join(programs), "PYTHONPATH": os.pathsep.join(paths), **fixed}

    def process(self, *command: object, env: dict[str, str] | None = None) -> str:
        """Output of a command; raises with its end when it fails or runs out of the stage's time.

        All processes that it started are stopped then: a compiler or a program under the sanitizer would take the time
        and the GPU of the next stages. Output goes through a file, which no process that lives on can keep open.
        """
        left = max(1.0, self.limit - time.monotonic())
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            try:
                process = subprocess.Popen(
                    [str(c) for c in command], cwd=ROOT, env={**self.environment(), **(env or {})}, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except FileNotFoundError:
                raise Failed(f"{command[0]} was not found") from None
            try:
                code = process.wait(left)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = None
            output.seek(0)
            text = output.read()
        if code is None:
            raise Failed(f"out of time\n{text[-TAIL:]}")
        if code:
            raise Failed(f"exit status {code}\n{text[-TAIL:]}")
        return text

    def python(self, *arguments: object, **keywords: Any) -> str:
        return self.process(sys.executable, *arguments, **keywords)

    # ---- results ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        if self.file is None:
            name = re.sub(r"[^a-z0-9]+", "-", self.results.get("gpu", "unknown gpu").lower()).strip("-")
            self.file = self.output / f"{self.results['date']}-{name}.json"
            if self.add and self.file.exists():
                before = json.loads(self.file.read_text(encoding="utf-8"))
                self.results = {**before, **self.results, "stages": before["stages"] | self.results["stages"]}
        self.output.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.file)

    def stage(self, stage: Stage) -> bool:
        start = time.monotonic()
        self.limit = start + stage.seconds
        record: dict[str, Any] = {"status": "passed"}
        try:
            record |= stage.run(self)
        except Failed as failure:
            record |= {"status": "failed", "output": str(failure)}
        record["seconds"] = round(time.monotonic() - start, 1)
        self.results["stages"][stage.name] = record
        if stage.name != "machine":
            self.save()
        print(f"{stage.name}: {record['status']} in {record['seconds']} s {record.get('summary', '')}", flush=True)
        if record["status"] == "failed":
            print(record["output"], flush=True)
        return record["status"] == "passed"


# ---- stages ------------------------------------------------------------------------------------------------------

PROBE = """
import json, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": p.name, "capability": [p.major, p.minor], "memory": p.total_memory,
                  "torch": torch.__version__, "cuda": torch.version.cuda}))
"""


def machine(check: Check) -> dict[str, Any]:
    """What is here, and the wheels of what is not."""
    wheels = sorted((ROOT / "gpu-wheels").glob("*.whl"))
    missing = [w for w in wheels if not installed(w)]
    if missing:
        options = ("--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", SITE)
        check.python("-m", "pip", "install", "-q", "--disable-pip-version-check", *options, *missing)
    found = json.loads(check.python("-c", PROBE).splitlines()[-1])
    major, minor = found.pop("capability")
    found["architecture"] = f"{major}{minor}" + ("a" if major >= 9 else "")
    nvcc = re.search(r"release ([\d.]+)", check.process("nvcc", "--version"))
    driver = check.process("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip().splitlines()[0]
    check.results |= found | {"nvcc": nvcc[1] if nvcc else "unknown", "driver": driver}
    return {"summary": f"{found['gpu']}, torch {found['torch']}", "wheels": [w.name.split("-")[0] for w in missing]}


def installed(wheel: Path) -> bool:
    """Whether Python finds the wheel's package in this version or a newer one."""
    name, version = wheel.name.split("-")[:2]
    try:
        return release(metadata.version(name.replace("_", "-"))) >= release(version)
    except metadata.PackageNotFoundError:
        return False


def release(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]


def build(check: Check) -> dict[str, Any]:
    architecture = check.results["architecture"]
    pybind = check.python("-m", "pybind11", "--cmakedir").strip()
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=check.environment()["PATH"]) else []
    check.process(
        "cmake", "-S", ROOT, "-B", BUILD / "cmake", *generator, "-DCMAKE_BUILD_TYPE=Release", "-DQIF_CUDA=ON",
        f"-DQIF_CUDA_ARCHITECTURES={architecture}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind}", "-DSKBUILD_PROJECT_VERSION=0.0.0",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'python' / 'qwen_image_fast'}",
    )  # fmt: skip
    check.process("cmake", "--build", BUILD / "cmake", "-j", str(os.cpu_count() or 2))
    report = "from qwen_image_fast import build_info; import json; print(json.dumps(build_info()))"
    info = json.loads(check.python("-c", report).splitlines()[-1])
    return {"summary": f"for {', '.join(info['cuda_architectures'])}"}


def pytest(*arguments: str) -> Callable[[Check], dict[str, Any]]:
    def run(check: Check) -> dict[str, Any]:
        output = check.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        summary = output.strip().splitlines()[-1]
        if not re.search(r"\d+ passed", summary):
            raise Failed(f"no test ran\n{output[-TAIL:]}")
        return {"summary": summary}

    return run


def sanitizer(tool: str) -> Callable[[Check], dict[str, Any]]:
    """compute-sanitizer on our kernels; without torch's memory pool, whose blocks hide accesses past a tensor."""

    def run(check: Check) -> dict[str, Any]:
        output = check.process(
            "compute-sanitizer", "--tool", tool, *only_our_kernels(check), "--error-exitcode", "9",
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SANITIZED,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
        found = re.search(r"(ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", output)
        if not re.search(r"\d+ passed", output) or found is None:
            raise Failed(f"no test ran\n{output[-TAIL:]}")
        return {"summary": found[1]}

    return run


def only_our_kernels(check: Check) -> list[str]:
    """The option that leaves other kernels alone has changed its name between versions; without it all are checked."""
    known = check.process("compute-sanitizer", "--help")
    return next(([option, "kns=qif"] for option in ("--kernel-name", "--kernel-regex") if option in known), [])


def bench(suite: str) -> Callable[[Check], dict[str, Any]]:
    def run(check: Check) -> dict[str, Any]:
        target = BUILD / f"{suite}.json"
        target.unlink(missing_ok=True)
        try:
            own = suite in ("gemms", "vae")
            module = [f"benchmarks.gpu_{suite}"] if own else ["benchmarks.gpu_bench", suite]
            check.python("-m", *module, target)
        finally:
            if target.exists():  # also what was measured before it failed
                check.results[suite] = json.loads(target.read_text(encoding="utf-8"))
        return {"summary": f"{len(check.results[suite])} cases"}

    return run


# In this order; the seconds add up to less than nine minutes.
STAGES = [
    Stage("machine", 30, machine),
    Stage("build", 95, build),
    Stage(
        "op tests",
        60,
        pytest(*OP_TESTS),
        "every op and its gradients, attention by our kernel and by torch's, FP8 rows",
    ),
    Stage("model tests", 40, pytest("tests/gpu"), "models, pipeline, grouped linear layers, CUDA graphs, side streams"),
    Stage("gemms", 30, bench("gemms"), "TFLOP/s of the linear layers, by CUTLASS and by cuBLASLt"),
    Stage("ops", 45, bench("ops"), "bandwidth of each op, TFLOP/s of attention"),
    Stage("block", 20, bench("block"), "time of one block against diffusers"),
    Stage("transformer", 70, bench("transformer"), "time and memory of the 60-layer transformer against diffusers"),
    Stage("vae", 30, bench("vae"), "time of the VAE at 1024 pixels against diffusers; its layers by cuDNN and CUTLASS"),
    Stage("training", 30, bench("training"), "time, memory and model FLOP utilisation of forward and backward"),
    Stage("memcheck", 45, sanitizer("memcheck"), "no invalid access to memory"),
    Stage("racecheck", 45, sanitizer("racecheck"), "no race on shared memory"),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help="only these, after `machine`")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - {s.name for s in STAGES}:
        parser.error(f"stages must be of {', '.join(s.name for s in STAGES)}, got {', '.join(sorted(unknown))}")
    check = Check(options.output, add=bool(options.stages))
    passed = True
    for stage in STAGES:
        if options.stages and stage.name not in (*options.stages, "machine"):
            continue
        passed = check.stage(stage) and passed
        if not passed and stage.name in ("machine", "build"):
            break
    if check.file is not None:
        print(f"results: {check.file}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
