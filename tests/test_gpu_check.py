"""The GPU check where there is no GPU: its stages, its results file, the page made of it, and the measuring code."""

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

from benchmarks import gpu_bench, gpu_check, gpu_gemms, gpu_model, gpu_status, gpu_vae, linear_table


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
    assert {f"tests/ops/test_{n}.py" for n in (*names, "fp8_rows", "conv2d")} <= files
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


TINY = {"attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 28, 28)}


def measured(suite, tmp_path, **arguments):
    target = tmp_path / f"{suite}.json"
    gpu_bench.main(suite, target, rounds=1, **arguments)
    return json.loads(target.read_text())


def test_measuring_ops(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "device", lambda: "cpu")
    records = measured("ops", tmp_path, heads=2, side=4, compile=False)
    assert {r["op"] for r in records} >= gpu_bench.BACKWARD_BYTES.keys()
    for r in records:
        assert r["difference"]["ours"] < 0.1 and r["forward ms"]["ours"] > 0 and r["backward ms"]["torch"] > 0
        assert (r["op"] in gpu_bench.BACKWARD_BYTES) == ("forward of copy" in r) != ("forward TFLOP/s" in r)
        assert ("kernels" in r) == (r["op"] == "joint_attention")


def test_measuring_a_block(tmp_path):
    (record,) = measured("block", tmp_path, sides=(4,), heads=1, compile=False)
    assert record["difference"] < 0.1 and record["pixels"] == 64
    assert record["block ms"].keys() == record["TFLOP/s"].keys() == {"ours", "diffusers", "products alone"}


def test_measuring_the_transformer(tmp_path):
    (record,) = measured("transformer", tmp_path, sides=(4,), layers=2, compile=False, **TINY)
    assert record["difference"] < 0.1 and record["pixels"] == 64 and record["layers"] == 2
    assert {"ours", "diffusers"} <= record["pair ms"].keys()


def test_measuring_training(tmp_path):
    (record,) = measured("training", tmp_path, side=4, layers=1, **TINY)
    assert record["step ms"].keys() == {"ours", "diffusers"} and record["TFLOP/s"]["ours"] > 0


def test_measuring_the_vae(tmp_path):
    target = tmp_path / "vae.json"
    gpu_bench.write(gpu_vae.vae((16,), 1, base_dim=8, num_res_blocks=1), target)
    decode, encode = json.loads(target.read_text())
    assert (
        decode["difference"] < 0.1 and decode["flops"] > 0 and decode["ms"].keys() == {"ours", "drop-in", "diffusers"}
    )
    assert encode["task"] == "encode" and encode["difference"] < 0.1


def test_measuring_linear_layers(tmp_path):
    target = tmp_path / "gemms.json"
    gpu_bench.write(gpu_gemms.gemms(width=16, img_rows=(9,), rounds=1), target)
    records = json.loads(target.read_text())
    assert [(r["op"], r["depth"], r["columns"]) for r in records] == [
        ("linear_qkv", 16, 16), ("linear_gelu", 16, 64), ("linear_gate_residual", 16, 16),
        ("linear_gate_residual", 64, 16),
    ]  # fmt: skip
    for r in records:
        assert max(r["difference"].values()) < 0.02 and r["TFLOP/s"]["torch"] > 0
    assert records[0]["flops"] == 2 * 3 * (9 + 7) * 16 * 16


def gemm(op, rows, txt, differs=0.0, **ms):
    times = {"torch": 1.0, **{f"cutlass {k}": v for k, v in ms.items()}}
    return {"op": op, "rows": [rows, txt], "depth": 3072, "columns": 12288, "ms": times,
            "difference": {k: differs for k in times if k != "torch"}}  # fmt: skip


def test_table_of_linear_kernels():
    records = [
        gemm("linear_gelu", 1024, 50, large=1.2, small=0.9),
        gemm("linear_gelu", 4096, 50, large=0.8, small=0.9),
        gemm("linear_gelu", 8192, 80, large=0.99, small=1.0),
        gemm("linear_qkv", 4096, 50, large=0.5, small=0.5, differs=0.1),
        gemm("linear_qkv", 8192, 80, large=0.5),
        gemm("linear_qkv", 8192, 999, large=2.0),
    ]
    assert linear_table.faster(records) == {
        "linear_gelu 3072 -> 12288": {"1024": "cutlass small", "4096": "cutlass large", "8192": "torch"}
    }
    machine = {"architecture": "90a", "gpu": "Some GPU", "torch": "2", "gemms": records}
    found = linear_table.table("text", [{**machine, "date": "2000-01-02"}, {**machine, "date": "2000-01-01"}])
    assert found["measured_by"] == ["2000-01-02, Some GPU, torch 2"] and set(found["faster"]) == {"sm_90"}
    assert linear_table.table("text", [{"date": "2000-01-01"}])["faster"] == {}


def test_flops_of_the_released_model():
    """226.5 MFLOP per token and block, and 4 tokens^2 width of attention."""
    assert gpu_bench.flops(1, 3072, 1) == 2 * 12 * 3072**2 + 4 * 3072
    assert gpu_bench.flops(4096 + 50, 3072, 60) == pytest.approx(69.0e12, rel=0.002)


def test_page_of_no_results():
    page = gpu_status.page([])
    assert "Nothing yet" in page
    for stage in gpu_check.STAGES[2:]:
        assert stage.shows and f"| {stage.name} | {stage.shows} |" in page


def test_bars():
    """Of an H200 alone; the faster of our ways, half a guidance pair."""
    copies = [{"op": "gelu_tanh", "dtype": "bfloat16", "forward of copy": 0.93, "backward of copy": 0.87},
              {"op": "gelu_tanh", "dtype": "float32", "forward of copy": 0.1, "backward of copy": 0.1}]  # fmt: skip
    times = {"ours": 232.0, "ours, CUDA graph": 228.0, "diffusers": 342.0, "diffusers compiled": 250.8}
    result = {"gpu": "NVIDIA H200", "ops": copies, "transformer": [{"pixels": 1024, "pair ms": times}],
              "stages": {s: {"status": "passed"} for s in ("memcheck", "racecheck")}}  # fmt: skip
    rows = [line.split(" | ")[1:] for line in gpu_status.bars([{**result, "gpu": "A100"}, result]).splitlines()[5:]]
    assert rows == [
        ["at most 115", "114", "met |"], ["at most 32", "not measured", " |"], ["at least 1.5", "1.5", "met |"],
        ["at least 1.15", "1.1", "missed |"], ["at least 88", "87", "missed |"], ["at most 0", "0", "met |"],
        ["at most 70", "not measured", " |"],
    ]  # fmt: skip
    assert gpu_status.bars([{**result, "gpu": "A100"}]) == gpu_status.bars([])
    found, missing = ({"status": "failed", "output": o} for o in ("exit status 9\n", "compute-sanitizer was not found"))
    for racecheck, failed in ((found, 1), (missing, None)):
        stages = {"memcheck": {"status": "passed"}, "racecheck": racecheck}
        assert gpu_status.sanitizers_failed({"stages": stages}) == failed


def test_page_is_up_to_date():
    assert gpu_status.TARGET.read_text() == gpu_status.page(gpu_status.results())


def test_page_of_results():
    op = {"op": "gelu_tanh", "dtype": "bfloat16", "label": "4096 x 12288", "forward GB/s": 2900.4,
          "forward of copy": 0.951, "backward of copy": 0.9}  # fmt: skip
    attention = {"op": "joint_attention", "dtype": "bfloat16", "label": "4096 image + 64 text tokens",
                 "forward TFLOP/s": {"ours": 500.2, "own kernel": 300.0}, "kernels": ["cudnn of torch", "varlen"],
                 "backward TFLOP/s": {"ours": 400.0}}  # fmt: skip
    times = {"ours": 231.25, "diffusers": 370.0}
    result = {
        "date": "2000-01-01", "gpu": "Some GPU", "torch": "2.11", "nvcc": "13.0", "driver": "580",
        "stages": {"build": {"status": "passed", "summary": "for sm_90a", "seconds": 1},
                   "op tests": {"status": "passed"}, "racecheck": {"status": "failed"}},
        "ops": [op, attention], "block": [{"pixels": 512, "block ms": {"ours": 1.25}}],
        "gemms": [{"label": "linear_qkv", "rows": [4096, 50], "depth": 3072, "columns": 3072,
                   "TFLOP/s": {"torch": 600.4, "cutlass large": 650.0}}],
        "transformer": [{"pixels": 1024, "layers": 60, "pair ms": times}],
        "vae": [
            {"task": "decode", "pixels": 1024, "dtype": "bfloat16", "times": 4.3,
             "ms": {"ours": 14.0, "diffusers": 60.0}, "TFLOP/s": 300.0},
            {"task": "layer", "label": "96 -> 96", "TFLOP/s": {"torch": 310.0, "cutlass": 320.0}},
        ],
        "training": [{"layers": 8, "pixels": 1024, "MFU": {"ours": 0.5}}],
    }  # fmt: skip
    text = gpu_status.page([result])
    for part in ("## Some GPU, 2000-01-01", "| build | passed | for sm_90a |", "| memcheck | not run |",
                 "| 2900 | 95% | 90% |", "| 4096 image + 64 text tokens | 500 | 300 | 400 |  |", "| 512 | 1.2 |",
                 "| linear_qkv | 4096 + 50 | 3072 -> 3072 | 600 | 650 |", "| 1024 | 231.2 | 370.0 |",
                 "utilisation ours 50%", "| decode | 1024 | 14.0 | 60.0 | 4.30 | 300 |",
                 "| 96 -> 96 | 310 | 320 |"):  # fmt: skip
        assert part in text
    left = text.split("## Not yet shown on a GPU")[1]
    assert "| op tests |" not in left and "| racecheck | no race on shared memory |" in left
