"""Build for the GPU of this machine, test, sanitize and measure: `make gpu-check`, in under eight minutes, offline.

Needs nvcc, a CUDA torch and what the package depends on; what is missing of the latter is taken from `gpu-wheels/`
(`make gpu-wheels`). What is worth most comes first. Every stage has a share of the time that the ones before it left;
the results file is rewritten after each, and a failed stage does not keep the next from running, unless there is
nothing to run. All that is said goes to gpu-check.log beside the results, too.

    python -m benchmarks.gpu_check [stage ...] [--output FOLDER] [--resume]
"""

from __future__ import annotations

import argparse
import contextlib
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
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
RESULTS = Path(__file__).parent / "results"
WHEELS = ROOT / "gpu-wheels"
SECONDS = 470
ENDS = 2000, 6000  # characters of a failed command's output that the results keep, from its start and its end

# What is asked for of the wheels besides what pyproject.toml names; CUTLASS's headers without what its Python needs.
TOOLS = ("diffusers", "cmake>=3.20", "ninja", "pybind11>=2.12", "pytest>=8")
CUTLASS = "nvidia_cutlass", "cutlass_library"  # the wheel, and the module that shows that it is there
CUDA = Path("/usr/local/cuda/bin")  # where it is often not on the path
NO_TESTS = 5  # pytest's exit status where all were left out

# The CUDA cases of the op tests; the sanitizer slows them down a hundredfold, so it gets one dtype and some shapes.
OP_TESTS = ("tests/ops", "-k", "cuda and not emulated and not test_library")
SANITIZED = (
    "tests/ops", "-k",
    "(cuda and not emulated and (test_accuracy or other_widths or misaligned or fp8 or int8_cuda) and bfloat16)"
    " or equal_segments",
)  # fmt: skip
# racecheck does not know what orders the bulk copies of these: it would see hazards that are none.
ALSO_CHECKED = {"memcheck": ("tests/gpu/test_linear_gpu.py",), "racecheck": ()}


@dataclass
class Stage:
    """`run` returns what the results say of it; `share` is its part of the time, after which it is stopped.

    A share of 0 means that nothing runs without this stage: it may take all the time.

    `shows`: what is known of a GPU once it has passed there (docs/gpu-status.md lists what is not).
    """

    name: str
    share: int
    run: Callable[[Check], dict[str, Any]]
    shows: str = ""


class Failed(Exception):
    """`record`: what the results say of the stage all the same."""

    def __init__(self, reason: str, **record: Any):
        super().__init__(reason)
        self.record = record


def ends(text: str) -> str:
    """The first failure of a run is at its start, what became of it at its end."""
    head, tail = ENDS
    return text if len(text) <= head + tail else f"{text[:head]}\n[...]\n{text[-tail:]}"


def stop(session: int) -> None:
    """Every process of a session: ninja gives each compiler a group of its own. Twice, as one may just have begun."""
    for file in (f for _ in range(2) for f in Path("/proc").glob("[0-9]*/stat")):
        with contextlib.suppress(OSError):  # it has just ended
            if int(file.read_text().rpartition(")")[2].split()[3]) == session:
                os.kill(int(file.parent.name), signal.SIGKILL)


class Check:
    def __init__(self, output: Path, add: bool = False):
        """`add`: keep what the results file of this day and GPU says of other stages."""
        self.output, self.add = output, add
        self.results: dict[str, Any] = {"date": datetime.date.today().isoformat(), "stages": {}}
        self.file: Path | None = None
        self.limit = 0.0  # when the stage must have ended

    # ---- processes ----------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT / "python"), str(ROOT), *([str(SITE)] if SITE.exists() else [])]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        # The tests ask torch for deterministic algorithms, which cuBLAS only has with a fixed workspace.
        fixed = {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
        programs = [str(SITE / "bin"), os.environ.get("PATH", ""), str(CUDA)]
        return {**os.environ, "PATH": os.pathsep.join(programs), "PYTHONPATH": os.pathsep.join(paths), **fixed}

    def process(self, *command: object, env: dict[str, str] | None = None, good: tuple[int, ...] = (0,)) -> str:
        """Output of a command; raises with it when its exit status is none of `good` or the stage's time is over.

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
            except OSError as error:
                raise Failed(f"{command[0]} was not found, or cannot be run: {error}") from None
            try:
                code = process.wait(left)
            except BaseException as error:
                stop(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):  # a hanging GPU can hold a process for ever
                    process.wait(10)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = None
            output.seek(0)
            text = output.read()
        if code is None:
            raise Failed(f"out of time\n{ends(text)}", whole=text)
        if code not in good:
            raise Failed(f"exit status {code}\n{ends(text)}", whole=text)
        return text

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.output.mkdir(parents=True, exist_ok=True)
        with open(self.output / "gpu-check.log", "a", encoding="utf-8") as log:
            log.write(f"{text}\n")

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

    def stage(self, stage: Stage, seconds: float) -> bool:
        start = time.monotonic()
        self.limit = start + seconds
        record: dict[str, Any] = {"status": "passed"}
        try:
            record |= stage.run(self)
        except Failed as failure:
            record |= {"status": "failed", "output": str(failure)} | failure.record
            record.pop("whole", None)
        except Exception:  # of this file, on a machine that no one thought of
            record |= {"status": "failed", "output": traceback.format_exc()}
        record["seconds"] = round(time.monotonic() - start, 1)
        self.results["stages"][stage.name] = record
        if "gpu" in self.results:
            self.save()
        if "gpu" in self.results:  # else there is nothing to keep a log of
            self.say(f"{stage.name}: {record['status']} in {record['seconds']} s {record.get('summary', '')}")
            for failure in record.get("failures", ()):
                self.say(f"  {failure}")
        if record["status"] == "failed":
            (self.say if "gpu" in self.results else print)(record["output"])
        return record["status"] == "passed"

    def passed_before(self) -> set[str]:
        """Stages that the results file of this day and GPU says have passed; known once `machine` has run."""
        return {name for name, record in self.results["stages"].items() if record["status"] == "passed"}


# ---- stages ------------------------------------------------------------------------------------------------------

PROBE = """
import json, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": p.name, "capability": [p.major, p.minor], "memory": p.total_memory,
                  "torch": torch.__version__, "cuda": torch.version.cuda}))
"""


def machine(check: Check) -> dict[str, Any]:
    """What is here, and the wheels of what is not."""
    found = json.loads(check.python("-c", PROBE).splitlines()[-1])
    major, minor = found.pop("capability")
    found["architecture"] = f"{major}{minor}" + ("a" if major >= 9 else "")
    check.results |= found | {"nvcc": "unknown", "driver": "unknown"}
    nvcc = re.search(r"release ([\d.]+)", check.process("nvcc", "--version"))
    driver = check.process("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip().splitlines()[0]
    check.results |= {"nvcc": nvcc[1] if nvcc else "unknown", "driver": driver}
    summary = f"{found['gpu']}, torch {found['torch']}"
    try:
        return {"summary": summary, "wheels": install_missing(check)}
    except Failed as failure:  # much of what follows needs none of them
        return {"summary": f"{summary}; wheels could not be installed: {failure}"}


def install_missing(check: Check) -> list[str]:
    """Into a folder of the build, from the wheels that were brought along: names of what is missing here or too old.

    pip says what; it leaves what is installed, which fits together, as it is.
    """
    if not WHEELS.exists():
        return []
    pip = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r'"(.+?)"', re.search(r"^dependencies = \[(.*?)\]", project, re.M | re.S)[1])
    needed = [n for n in needed if not n.startswith("torch")]  # it is here, whatever its own metadata asks for
    report = SITE.with_name("wheels.json")
    report.parent.mkdir(parents=True, exist_ok=True)
    check.python(*pip, "--dry-run", "--report", report, "--find-links", WHEELS, *needed, *TOOLS)
    urls = [p["download_info"]["url"] for p in json.loads(report.read_text(encoding="utf-8"))["install"]]
    missing = [Path(unquote(urlsplit(u).path)) for u in urls]
    headers, module = CUTLASS
    if "True" in check.python("-c", f"import importlib.util as i; print(i.find_spec('{module}') is None)"):
        missing += WHEELS.glob(f"{headers}-*.whl")
    if missing:
        check.python(*pip, "--no-deps", "--no-compile", "--upgrade", "--target", SITE, *missing)
    return [w.name.split("-")[0] for w in missing]


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


def pytest(folder: str | Path, *arguments: str) -> Callable[[Check], dict[str, Any]]:
    """Each file of tests in a process of its own, some at a time: after an illegal access a process has no GPU left."""

    def one(check: Check, file: Path) -> tuple[str, list[str]]:
        command = ("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", file, *arguments)
        try:
            return check.python(*command, good=(0, NO_TESTS)).strip().splitlines()[-1], []
        except Failed as failure:
            return f"failed: {failure}", failures(failure.record.pop("whole", str(failure)))

    def run(check: Check) -> dict[str, Any]:
        files = sorted((ROOT / folder).glob("test_*.py"))
        with ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 2) // 2))) as pool:
            answers = list(pool.map(lambda f: one(check, f), files))
        said = {f.name: text for f, (text, _) in zip(files, answers)}
        found = [failure for _, ids in answers for failure in ids]
        counts: Counter[str] = Counter()
        for text in said.values():
            for n, what in re.findall(r"(\d+) (passed|failed|error|skipped)", text.splitlines()[-1]):
                counts[what] += int(n)
        summary = ", ".join(
            f"{counts[what]} {what}" for what in ("passed", "failed", "error", "skipped") if counts[what]
        )
        if bad := [f"{name} {text}" for name, text in said.items() if text.startswith("failed: ")]:
            raise Failed("\n\n".join(bad), summary=summary, failures=found)
        if counts["passed"] <= counts["skipped"]:
            raise Failed("few tests ran, or none\n" + "\n".join(f"{n}: {t}" for n, t in said.items()), summary=summary)
        return {"summary": summary, "files": said}

    return run


def failures(output: str) -> list[str]:
    """By the id of the test, from what `pytest -v` says as it goes: those that failed, and the one that it ended in."""
    lines = re.findall(r"^(\S+\.py::.*?) *(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*)?$", output, re.M)
    ended = {name for name, status in lines if status}
    bad = [f"{name} {status.lower()}" for name, status in lines if status in ("FAILED", "ERROR")]
    return bad + [f"{name} did not end" for name, status in lines if not status and name not in ended]


def sanitizer(tool: str) -> Callable[[Check], dict[str, Any]]:
    """compute-sanitizer on our kernels; without torch's memory pool, whose blocks hide accesses past a tensor."""

    def run(check: Check) -> dict[str, Any]:
        output = check.process(
            "compute-sanitizer", "--tool", tool, *only_our_kernels(check), "--error-exitcode", "9",
            sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *ALSO_CHECKED[tool], *SANITIZED,
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
        found = re.search(r"(ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", output)
        if not re.search(r"\d+ passed", output) or found is None:
            raise Failed(f"no test ran\n{ends(output)}")
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


# What is worth most comes first; what may take long for little, last.
STAGES = [
    Stage("machine", 0, machine),
    Stage("build", 0, build),
    Stage(
        "op tests",
        50,
        pytest(*OP_TESTS),
        "every op and its gradients, attention by our kernel and by torch's, FP8 rows",
    ),
    Stage("model tests", 35, pytest("tests/gpu"), "models, pipeline, grouped linear layers, CUDA graphs, side streams"),
    Stage("transformer", 60, bench("transformer"), "time and memory of the 60-layer transformer against diffusers"),
    Stage("ops", 30, bench("ops"), "bandwidth of each op, TFLOP/s of attention"),
    Stage("vae", 25, bench("vae"), "time of the VAE at 1024 pixels against diffusers; its layers by cuDNN and CUTLASS"),
    Stage("training", 25, bench("training"), "time, memory and model FLOP utilisation of forward and backward"),
    Stage("gemms", 25, bench("gemms"), "TFLOP/s of the linear layers, by CUTLASS and by cuBLASLt"),
    Stage("block", 15, bench("block"), "time of one block against diffusers"),
    Stage("memcheck", 40, sanitizer("memcheck"), "no invalid access to memory"),
    Stage("racecheck", 40, sanitizer("racecheck"), "no race on shared memory"),
    Stage("compiled", 50, bench("compiled"), "time of what torch.compile makes of diffusers"),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help="only these, after `machine`")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file and the log")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what has passed by the file of this day and GPU there"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.stages) - {s.name for s in STAGES}:
        parser.error(f"stages must be of {', '.join(s.name for s in STAGES)}, got {', '.join(sorted(unknown))}")
    left = [s for s in STAGES if not options.stages or s.name in (*options.stages, "machine")]
    end = time.monotonic() + SECONDS
    check = Check(options.output, add=bool(options.stages) or options.resume)
    passed = True
    while left:
        stage = left.pop(0)
        part = stage.share / sum(s.share for s in [stage, *left]) if stage.share else 1
        before = check.file is None
        passed = check.stage(stage, (end - time.monotonic()) * part) and passed
        if not passed and not stage.share:
            break
        if options.resume and before and check.file is not None:
            done = check.passed_before()
            left = [s for s in left if not s.share or s.name not in done]  # what was built may be gone
    if check.file is not None:
        check.say(f"results: {check.file}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
