"""The GPU check where there is no GPU: its stages, its results file, and what ends or hangs in it."""

import functools
import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("diffusers")

from benchmarks import gpu_bench, gpu_check, gpu_model, gpu_status


def fake(name, run):
    return gpu_check.Stage(name, 60, run)


def test_results_are_written_as_they_come(tmp_path, monkeypatch, capsys):
    def machine(check):
        check.results |= {"gpu": "Some GPU 1", "torch": "2", "nvcc": "13.0", "driver": "580"}
        return {}

    def broken(check):
        check.python("-c", "print('the reason'); raise SystemExit(3)")

    def strange(check):
        return {"summary": json.loads("{")}

    def slow(check):
        started = tmp_path / "started"
        time_out_once(monkeypatch, started.exists)
        check.python("-c", f"import time; print('so far', flush=True); open({str(started)!r}, 'w'); time.sleep(600)")

    seen = []

    def last(check):
        seen.extend(json.loads(check.file.read_text())["stages"])
        return {"summary": "ok"}

    stages = [
        fake("machine", machine), fake("broken", broken), fake("strange", strange), fake("slow", slow),
        fake("last", last),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("*-some-gpu-1.json")
    result = json.loads(file.read_text())["stages"]
    assert [r["status"] for r in result.values()] == ["passed", "failed", "failed", "failed", "passed"]
    assert "JSONDecodeError" in result["strange"]["output"]
    assert "exit status 3" in result["broken"]["output"] and "the reason" in result["broken"]["output"]
    assert "out of time" in result["slow"]["output"] and "so far" in result["slow"]["output"]
    assert set(seen) == {"machine", "broken", "strange", "slow"}
    # One stage again: the others' results stay.
    monkeypatch.setattr(gpu_check, "STAGES", [*stages[:3], fake("slow", lambda check: {}), stages[4]])
    assert gpu_check.main(["slow", "--output", str(tmp_path)]) == 0
    statuses = {name: r["status"] for name, r in json.loads(file.read_text())["stages"].items()}
    assert statuses == {
        "machine": "passed", "broken": "failed", "strange": "failed", "slow": "passed", "last": "passed"
    }  # fmt: skip


def test_the_stages_share_the_time(tmp_path, monkeypatch):
    """What others need may take all of it; what a stage leaves is shared by those after it."""
    now, limits = 1000.0, {}
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now)

    def stage(name, share, takes):
        def run(check):
            nonlocal now
            limits[name] = check.limit - now
            now += takes
            return {}

        return gpu_check.Stage(name, share, run)

    stages = [stage("machine", 0, 40), stage("second", 1, 10), stage("third", 2, 400), stage("last", 1, 0)]
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    assert gpu_check.main(["--output", str(tmp_path)]) == 0
    assert limits == {"machine": 470, "second": 107.5, "third": pytest.approx(420 * 2 / 3), "last": 20}
    assert gpu_check.main(["last", "--output", str(tmp_path)]) == 0
    assert limits["last"] == 430 and gpu_check.SECONDS == 470


def test_what_has_passed_is_left_out(tmp_path, monkeypatch):
    """On the same day, GPU and folder; a build is done anew, as the machine may be another."""
    ran = []

    def stage(name, share, fails=False):
        def run(check):
            ran.append(name)
            check.results |= {"gpu": "Some GPU"}
            if fails and ran.count(name) == 1:
                raise gpu_check.Failed("for once", failures=["tests/test_some.py::test_it failed"])
            return {}

        return gpu_check.Stage(name, share, run)

    stages = [stage("machine", 0), stage("build", 0), stage("good", 1), stage("bad", 1, True), stage("last", 1)]
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    ran.append("-")
    assert gpu_check.main(["--output", str(tmp_path), "--resume"]) == 0
    assert ran == ["machine", "build", "good", "bad", "last", "-", "machine", "build", "bad"]
    (file,) = tmp_path.glob("*-some-gpu.json")
    assert {r["status"] for r in json.loads(file.read_text())["stages"].values()} == {"passed"}
    log = (tmp_path / "gpu-check.log").read_text()
    assert "good: passed in" in log and "  tests/test_some.py::test_it failed\n" in log and "for once" in log


def test_failures_by_the_id_of_the_test():
    """Also the one in which the process ended, whose parameters may hold spaces."""
    output = """\
tests/ops/test_x.py::test_a[1 - two] PASSED                              [ 20%]
tests/ops/test_x.py::test_b FAILED                                       [ 40%]
tests/ops/test_x.py::test_c[cuda] SKIPPED (no GPU)                       [ 60%]
tests/ops/test_x.py::test_d ERROR                                        [ 80%]
tests/ops/test_x.py::test_e[(3, 4)] \nFatal Python error: Aborted
"""
    assert gpu_check.failures(output) == [
        "tests/ops/test_x.py::test_b failed", "tests/ops/test_x.py::test_d error",
        "tests/ops/test_x.py::test_e[(3, 4)] did not end",
    ]  # fmt: skip


class StandIn:
    """What the commands of a check say on a machine with a GPU, with nothing run."""

    def __init__(self, fails=()):
        self.fails, self.commands = fails, []

    def __call__(self, *command, env=None, good=(0,)):
        words = [str(c) for c in command]
        text = " ".join(words)
        self.commands.append(text)
        if gpu_check.PROBE in words:
            return json.dumps({"gpu": "NVIDIA H200", "capability": [9, 0], "memory": 1, "torch": "2", "cuda": "13"})
        if "build_info" in text:
            return '{"cuda_architectures": ["sm_90a"]}'
        if "benchmarks.gpu_" in text:
            suite = Path(words[-1]).stem
            Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)
            Path(words[-1]).write_text(json.dumps(MEASURED.get(suite, [])))
            return ""
        if "compute-sanitizer" in words and "--tool" in words:
            return f"9 passed\n========= {'RACECHECK' if 'racecheck' in words else 'ERROR'} SUMMARY: 0 errors\n"
        if "pytest" in words:
            name = next(w for w in words if w.endswith(".py"))
            if Path(name).name in self.fails:
                raise gpu_check.Failed("exit status 1", whole=f"{name}::test_one[cuda] FAILED [100%]\n1 failed")
            return f"{name}::test_one[cuda] PASSED [100%]\n3 passed in 1 s\n"
        return {"nvcc": "release 13.0,", "nvidia-smi": "580.1\n"}.get(words[0], "--kernel-name")


PAIR = {"pixels": 1024, "layers": 60, "pair ms": {"ours": 224.0, "diffusers": 370.0}}
MEASURED = {
    "transformer": [PAIR],
    "compiled": [{**PAIR, "pair ms": {"ours": 300.0, "diffusers compiled": 280.0}}],
    "gemms": [{"label": "linear_qkv", "rows": [8192, 80], "depth": 3072, "columns": 3072, "flops": 9e11,
               "ms": {"torch": 1.5}, "TFLOP/s": {"torch": 600.0}}],
}  # fmt: skip


def test_every_stage_from_end_to_end(tmp_path, monkeypatch, capsys):
    """With what stands in for the machine: all stages in their order, the file, the log and the page made of it."""
    monkeypatch.setattr(gpu_check, "WHEELS", tmp_path / "none")
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_check.Check, "process", run := StandIn(("test_gelu_tanh.py",)))
    folder = tmp_path / "of the run"
    assert gpu_check.main(["--output", str(folder)]) == 1
    (result,) = gpu_status.results(folder)
    statuses = {name: r["status"] for name, r in result["stages"].items()}
    assert list(statuses) == [s.name for s in gpu_check.STAGES]
    assert {name for name, status in statuses.items() if status == "failed"} == {"op tests"}
    (failure,) = result["stages"]["op tests"]["failures"]
    assert failure.endswith("tests/ops/test_gelu_tanh.py::test_one[cuda] failed")
    assert failure in (folder / "gpu-check.log").read_text()
    assert [gpu_status.pair(result, 1024)[n] for n in ("ours", "diffusers compiled")] == [224.0, 280.0]
    assert gpu_model.measured([result]).products == pytest.approx(600e12)
    page = gpu_status.page([result])
    assert failure in page and "| 1024 pixels, one branch of guidance, ms | at most 115 | 112 | met |" in page
    racecheck = next(c for c in run.commands if "--tool racecheck" in c)
    assert "test_linear_gpu" not in racecheck and any("memcheck" in c and "test_linear_gpu" in c for c in run.commands)
    run.fails, count = (), len(run.commands)
    assert gpu_check.main(["--output", str(folder), "--resume"]) == 0
    again = run.commands[count:]
    assert not any("benchmarks.gpu_" in c or "sanitizer" in c or "tests/gpu" in c for c in again)
    assert any("tests/ops/test_gelu_tanh.py" in c for c in again)


def test_nothing_runs_after_a_failed_build(tmp_path, monkeypatch):
    def broken(check):
        raise gpu_check.Failed("no compiler")

    stages = [gpu_check.Stage("build", 0, broken), fake("last", lambda check: pytest.fail("it ran"))]
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    assert gpu_check.main(["--output", str(tmp_path)]) == 1


PROBED = '{"gpu": "Some GPU", "capability": [9, 0], "memory": 1, "torch": "2", "cuda": "13"}'


def test_a_gpu_without_a_compiler_leaves_a_results_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.Check, "python", lambda check, *a: f"a warning\n{PROBED}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "CUDA", tmp_path)
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("*-some-gpu.json")
    result = json.loads(file.read_text())
    assert list(result["stages"]) == ["machine"] and "nvcc was not found" in result["stages"]["machine"]["output"]
    assert result["architecture"] == "90a"


def time_out_once(monkeypatch, condition):
    """The next process runs out of its time as soon as it has done something, however fast the machine is."""
    wait = subprocess.Popen.wait

    def wait_for_it(process, timeout=None):
        while not condition():
            assert process.poll() is None
            time.sleep(0.01)
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise subprocess.TimeoutExpired("process", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_it)


def test_a_stage_out_of_time_leaves_no_process_behind(tmp_path, monkeypatch):
    """A grandchild that holds the output open, in a group of its own like a compiler under ninja."""
    check, started = gpu_check.Check(tmp_path), tmp_path / "started"
    grandchild = "import os, time; os.setpgrp(); print(os.getpid(), flush=True); "
    grandchild += f"open({str(started)!r}, 'w'); time.sleep(600)"
    time_out_once(monkeypatch, started.exists)
    with pytest.raises(gpu_check.Failed, match="^out of time\n[0-9]+") as failure:
        check.python("-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])")
    stat = Path("/proc", str(failure.value).split()[-1], "stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # until the system has removed it


def test_nothing_runs_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert gpu_check.main(["--output", str(tmp_path)]) == 1 and not list(tmp_path.iterdir())


def wheel(folder, name, requires=""):
    """The least that pip installs."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "here = True\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}",
    }  # fmt: skip
    files[f"{info}/RECORD"] = "".join(f"{f},,\n" for f in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_of_what_is_missing(tmp_path, monkeypatch):
    """What is asked for and what that needs, not what is there; a wheel that was left at home is named."""
    wheels = tmp_path / "wheels with a space"
    wheels.mkdir()
    wheel(wheels, "qif_first", "Requires-Dist: qif_second\nRequires-Dist: torch\n")
    wheel(wheels, "qif_second")
    wheel(wheels, "torch")  # older than that which is installed
    wheel(wheels, "qif_headers")
    monkeypatch.setattr(gpu_check, "WHEELS", wheels)
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_check, "TOOLS", ("qif-first", "pytest>=8"))
    monkeypatch.setattr(gpu_check, "CUTLASS", ("qif_headers", "qif_headers"))
    check = gpu_check.Check(tmp_path)
    check.limit = time.monotonic() + 600
    assert sorted(gpu_check.install_missing(check)) == ["qif_first", "qif_headers", "qif_second"]
    assert {p.name for p in (tmp_path / "site").glob("*.py")} == {"qif_first.py", "qif_headers.py", "qif_second.py"}
    assert gpu_check.install_missing(check) == []
    monkeypatch.setattr(gpu_check, "TOOLS", ("qif-third",))
    monkeypatch.setattr(gpu_check, "PROBE", f"print({PROBED!r})")
    monkeypatch.setattr(check, "process", lambda *a: "13.0")
    monkeypatch.setattr(check, "python", functools.partial(gpu_check.Check.process, check, sys.executable))
    assert "No matching distribution found for qif-third" in gpu_check.machine(check)["summary"]


def test_a_crash_in_one_file_of_tests_leaves_the_others(tmp_path):
    sources = {
        "crash": "import os\ndef test_gpu():\n    os._exit(134)\n",
        "good": "def test_gpu():\n    pass\ndef test_other():\n    assert 0\n",
        "bad": "def test_gpu():\n    assert 1 == 2\ndef test_gpu_2():\n    pass\n",
        "none": "def test_other():\n    assert 0\n",
    }
    for name, text in sources.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    check = gpu_check.Check(tmp_path)
    check.limit = time.monotonic() + 600
    run = gpu_check.pytest(tmp_path, "-k", "gpu and not other")
    with pytest.raises(gpu_check.Failed, match="(?s)test_bad.py failed: exit status 1.*assert 1 == 2.*test_crash.py"):
        run(check)
    (tmp_path / "test_crash.py").unlink()
    with pytest.raises(gpu_check.Failed) as failure:
        run(check)
    assert failure.value.record["summary"] == "2 passed, 1 failed"
    (failed,) = failure.value.record["failures"]
    assert failed.endswith("/test_bad.py::test_gpu failed")
    (tmp_path / "test_bad.py").unlink()
    found = run(check)
    assert found["summary"] == "1 passed" and list(found["files"]) == ["test_good.py", "test_none.py"]
    (tmp_path / "test_none.py").write_text("import pytest\ndef test_gpu():\n    pytest.skip('no GPU')\n")
    with pytest.raises(gpu_check.Failed, match="(?s)few tests ran.*1 skipped"):
        run(check)


@pytest.mark.parametrize(
    ("help", "option"),
    [("--kernel-name arg", ["--kernel-name", "kns=qif"]), ("--kernel-regex", ["--kernel-regex", "kns=qif"]), ("", [])],
)
def test_the_sanitizer_is_pointed_at_our_kernels(monkeypatch, help, option):
    check = gpu_check.Check(Path())
    monkeypatch.setattr(check, "process", lambda *a: help)
    assert gpu_check.only_our_kernels(check) == option


def test_the_sanitizer_sees_every_op():
    """On CUDA alone: no case of another device, which would only take its time."""
    tests = *gpu_check.ALSO_CHECKED["memcheck"], *gpu_check.SANITIZED
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *tests]
    lines = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True).stdout.splitlines()
    files = {line.partition("::")[0] for line in lines if "::" in line}
    names = {re.sub("(_backward)?_cuda$", "", f.stem) for f in (gpu_check.ROOT / "csrc/kernels").glob("*_cuda.cu")}
    names = names - {"int8_rows", "linear_int8"} | {"int8_cuda"}  # which tests both
    assert {f"tests/ops/test_{n}.py" for n in (*names, "fp8_rows", "fp8_cuda", "conv2d")} <= files
    assert "tests/gpu/test_linear_gpu.py" in files
    assert not [line for line in lines if "emulated" in line or "[cpu" in line]


def test_long_output_keeps_the_first_failure_and_the_summary():
    text = "first" + "x" * 20000 + "last"
    assert gpu_check.ends(text).startswith("first") and gpu_check.ends(text).endswith("last")
    assert len(gpu_check.ends(text)) < 9000 and gpu_check.ends("short") == "short"


def test_what_was_measured_before_a_failure_is_kept(tmp_path):
    def records():
        yield {"case": 1}
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError):
        gpu_bench.write(records(), tmp_path / "some.json")
    assert json.loads((tmp_path / "some.json").read_text()) == [{"case": 1}]
