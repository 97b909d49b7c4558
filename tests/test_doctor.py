"""The self-test passes on right kernels and finds wrong ones; the timings measure what they say."""

import importlib
import json
import os
import time

import pytest
import torch
from typer.testing import CliRunner

from qwen_image_fast import _C, doctor, doctor_picture, ops
from qwen_image_fast.cli import app
from qwen_image_fast.ops import _choices, _linear

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*args):
    return CliRunner().invoke(app, list(args))


def instruction_sets():
    info = _C.build_info()
    return info["cpu_kernels"][: info["cpu_kernels"].index(info["cpu_best"]) + 1]


def test_every_op_is_tested():
    no_ops = {
        "reference",
        "has_kernels",
        "keeping_choices",
        "linear_kernels",
        "pack_conv3x3",
        "eight_bits",
        "int8_kernels",
        "int8_unit",
        "Int8Weight",
    }
    of_bytes = {
        "picture_statistics",
        "PictureStatistics",
        "int8_rows",
        "linear_int8",
    }  # without dtypes and gradients: tests/ops/ has all of it
    assert set(doctor.CASES) == set(ops.__all__) - no_ops - of_bytes


def test_right_kernels():
    before = _C.build_info()["cpu_in_use"], torch.get_deterministic_debug_mode(), torch.random.get_rng_state()
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "all kernels agree with their references" in result.stdout
    cuda = _C.build_info()["cuda_architectures"] or ["none in this build"]
    for text in ("baseline", torch.__version__, *cuda, "diffusers", "mixed lengths", "lengths of text", *doctor.CASES):
        assert text in result.stdout
    assert _C.build_info()["cpu_in_use"] == before[0] and torch.get_deterministic_debug_mode() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_json_covers_every_op_dtype_and_instruction_set():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["agree"] is True and report["environment"]["torch"].startswith(torch.__version__)
    tested = {(v["op"], v["kernels"], v["dtype"]) for v in report["self_test"]}
    dtypes = ("float32", "bfloat16", "float16")
    own = {(op, s, d) for op, (_, own) in doctor.CASES.items() if own for s in instruction_sets() for d in dtypes}
    of_torch = {(op, "torch", d) for op, (_, own) in doctor.CASES.items() if not own for d in dtypes}
    amx = {("linear_amx", "amx", "float32")} if _C.build_info()["amx"] else set()
    assert tested == own | of_torch | amx
    assert all(0 < v["worst"] <= 1 for v in report["self_test"])


def test_the_chosen_kernels_stay_chosen():
    before = _C.build_info()["cpu_in_use"]
    try:
        _C.set_isa("baseline")
        doctor.self_test()
        assert _C.build_info()["cpu_in_use"] == "baseline"
    finally:
        _C.set_isa(before)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.03


def plant(monkeypatch, name, wrong):
    """Replace an op by `wrong(real op, args)`."""
    real = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: wrong(real, args))


def only_in(condition, wrong):
    return lambda real, args: wrong(real, args) if condition(args) else real(*args)


def scaled(real, args):
    return real(*args) * 1.01


def one_element(real, args):
    out = real(*args).clone()
    out.view(-1)[5] += 0.5
    return out


def unwritten(real, args):
    out = real(*args).clone()
    out.view(-1)[5] = float("nan")
    return out


def wrong_gradient(real, args):
    return real(ScaledGradient.apply(args[0]), *args[1:])


def raises(real, args):
    raise RuntimeError("no such kernel")


def second_result(real, args):
    residual, out = real(*args)
    return residual, out * 1.01


def in_bfloat16(args):
    return args[0].dtype == torch.bfloat16


def in_baseline(args):
    return _C.build_info()["cpu_in_use"] == "baseline"


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [
        ("guided_step", scaled, "guided_step, baseline kernels, float32: "),
        ("layer_norm_modulate", one_element, "baseline kernels, float32: result 0: max error 5.0"),
        ("layer_norm_modulate", unwritten, "float32: "),
        ("joint_attention", wrong_gradient, "joint_attention, torch kernels, float32: gradient 0: "),
        ("gate_residual_norm_modulate", second_result, "float32: result 1: "),
        ("qk_norm_rope", raises, "qk_norm_rope, baseline kernels, float32: RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_kernel(monkeypatch, name, wrong, text):
    plant(monkeypatch, name, wrong)
    result = run("doctor")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert text in errors[0] and all(f"error: {name}, " in line for line in errors)
    assert "DIFFERS" in result.stdout and "all kernels agree" not in result.stdout
    assert json.loads(run("doctor", "--json").stdout)["agree"] is False


@pytest.mark.parametrize(
    ("condition", "places"),
    [
        (in_bfloat16, {(s, "bfloat16") for s in instruction_sets()}),
        (in_baseline, {("baseline", d) for d in ("float32", "bfloat16", "float16")}),
    ],
)
def test_wrong_in_one_place_only(monkeypatch, condition, places):
    plant(monkeypatch, "guided_step", only_in(condition, scaled))
    bad = [v for v in doctor.self_test() if v.problem]
    assert {(v.op, v.kernels, v.dtype) for v in bad} == {("guided_step", *place) for place in places}
    assert all(v.worst > 1 for v in bad)


def test_the_rule_is_twice_the_references_own_error():
    exact = torch.tensor([1.0, -4.0, 2.0, 0.0], dtype=torch.float64)
    reference = (exact + torch.tensor([1e-3, 0, 0, 0])).float()
    eps = torch.finfo(torch.float32).eps
    (_, _, worst), (_, error, rms) = doctor._errors((exact - 3e-3).float(), reference, exact)
    assert worst == pytest.approx(2e-3 + 0.5 * eps * 4, rel=1e-3)
    assert error == pytest.approx(3e-3, rel=1e-3) and rms == pytest.approx(2e-3 / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_80", (9, 0), False), ("sm_86", (8, 0), False),
        ("sm_90a", (9, 0), True), ("sm_100a", (10, 0), True), ("sm_100a", (10, 3), False), ("sm_100f", (10, 3), True),
        ("sm_120", (12, 0), True), ("native", (9, 0), False), ("sm_120", (13, 0), False), ("sm_120+PTX", (13, 0), True),
        ("sm_120+PTX", (12, 1), True), ("sm_120+PTX", (10, 3), False), ("sm_90a+PTX", (12, 0), False),
    ],
)  # fmt: skip
def test_machine_code_runs_on_its_own_generation(architecture, capability, runs):
    assert doctor.runs_on(architecture, *capability) is runs


def test_doctor_says_what_the_build_can_do_on_a_gpu(monkeypatch):
    class Gpu:
        name, total_memory, major, minor = "Some GPU", 80e9, 9, 0

    info = {**_C.build_info(), "cuda_architectures": []}
    monkeypatch.setattr(doctor._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Gpu)
    monkeypatch.setattr(doctor, "describe_attention", lambda device: ("cudnn", device, "any"))
    monkeypatch.setattr(doctor, "describe_linear", lambda device: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(doctor._eight_bits, "capability_of", lambda device: (9, 0))
    assert "Some GPU, 80 GB, sm_90, built without CUDA: build" in doctor.environment()["CUDA"]
    info["cuda_architectures"] = ["sm_80"]
    assert "no kernels for it: build from source with QIF_CUDA_ARCHITECTURES=90" in doctor.environment()["CUDA"]
    info["cuda_architectures"] = ["sm_80", "sm_90a"]
    assert "this build has kernels for it" in doctor.environment()["CUDA"]
    assert doctor.environment()["attention, mixed lengths"] == "cuda"
    said = "on a GPU int8 at 2 times the peak of bfloat16 on sm_90; by mma.sync"
    assert doctor.environment()["8-bit products"].endswith(said)
    monkeypatch.setattr(importlib.import_module("qwen_image_fast.ops.linear_int8"), "WGMMA", True)
    assert doctor.environment()["8-bit products"].endswith("on sm_90; by wgmma")


def test_doctor_says_why_torch_sees_no_gpu(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    text = "torch has CUDA 13.0 but sees no device: The NVIDIA driver on your system is too old (found version 11040)."
    assert doctor.environment()["CUDA"] == text


def test_doctor_says_what_computes_linear_layers(monkeypatch):
    monkeypatch.setattr(_linear, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_linear, "AMX", False)
    assert _linear.describe_linear("cpu") == "torch's products"
    monkeypatch.setattr(_linear, "AMX", True)
    assert _linear.describe_linear("cpu") == "torch's products; large ones in float32 on AMX (linear_amx)"
    monkeypatch.setattr(_linear.lib, "_has_cuda", False)
    assert "this build has no CUTLASS kernels" in _linear.describe_linear("cuda")
    monkeypatch.setattr(_linear.lib, "_has_cuda", True)
    assert 'nothing measured on sm_90: ops.linear_kernels("cutlass") asks' in _linear.describe_linear("cuda")
    monkeypatch.setattr(_linear, "_faster", {"sm_90": {"linear_gelu 1 -> 4": {"1": "cutlass large"}}})
    assert "CUTLASS where measured faster on sm_90" in _linear.describe_linear("cuda")


def test_environment_names_what_is_missing(monkeypatch):
    def version(package):
        raise doctor.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor.environment()["peft"] == "not installed"


def test_how_threads_wait(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (11.04, 0, 0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.environment()["threads"].endswith("they spin before they sleep; load 11.0 on 2 processors")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert f"{torch.get_num_threads()}; waiting: OMP_WAIT_POLICY=passive; load" in doctor.environment()["threads"]


def test_medians_of_both_sides():
    calls = []

    def work(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    first, second = doctor._interleaved(lambda: work("a", 0.002), lambda: work("b", 0.02), 3)
    assert calls == ["a", "b"] * 4  # the first round warms up
    assert 0.002 <= first < second and second >= 0.02


def test_bench(monkeypatch):
    real = ops.guided_step
    monkeypatch.setattr(ops, "guided_step", lambda *args: time.sleep(0.05) or real(*args))
    result = run("bench", "--quick", "--json", "--width", "128")
    assert result.exit_code == 0, result.output
    timings = {t["name"]: t for t in json.loads(result.stdout)["timings"]}
    *names, step = timings
    assert names == list(doctor.CASES) and step.startswith("transformer, 2 blocks of width 128")
    slow = timings["guided_step"]
    assert slow["ours"] >= 0.05 > slow["reference"]
    # cond, uncond, sample and the result, 256 x 64 float32 each, and a few offsets
    assert slow["gb_per_s"] * slow["ours"] * 1e9 == pytest.approx(4 * 256 * 64 * 4, rel=1e-3)


def test_bench_table():
    timings = [doctor.Timing("op", 0.001, 0.003, 12.34), doctor.Timing("model", 0.5, 1.0)]
    from rich.console import Console

    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor.timing_table(timings, "title"))
    text = console.export_text()
    for part in ("1.000 ms", "3.000 ms", "3.00x", "12.3", "2.00x"):
        assert part in text


def test_bench_refuses_a_bad_width():
    result = run("bench", "--width", "200")
    assert result.exit_code == 2 and result.stderr == "error: --width must be a multiple of 128, got 200\n"


# ---- a picture, and versions ----------------------------------------------------------------------------------------


@pytest.fixture
def no_self_test(monkeypatch):
    monkeypatch.setattr(doctor, "self_test", lambda: [])


def test_a_picture_is_made(no_self_test):
    report = json.loads(run("doctor", "--json").stdout)
    drawn = report["picture"]
    assert drawn["problem"] is None and 0 <= drawn["difference"] <= 2 and drawn["seconds"] > 0 and not report["too_old"]
    assert "a picture of 128 x 128 in " in run("doctor").stdout


def wrong_step(*args):
    out = ops.guided_step(*args)
    return out if _choices.use_reference() else out * 1.2


def no_function(*_, **__):
    raise ImportError("cannot import name 'a' from 'b'")


@pytest.mark.parametrize(
    ("place", "fault", "text"),
    [
        (("qwen_image_fast.sampling", "guided_step"), wrong_step, "differs from that of the references by"),
        (("transformers.Qwen2_5_VLModel", "__init__"), no_function, "ImportError: cannot import name 'a' from 'b'"),
    ],
    ids=["wrong", "too old a library"],
)
def test_a_picture_that_fails(place, fault, text, no_self_test, monkeypatch):
    """What the tests of the ops cannot see: all was well, by the doctor, with a torch that could not run the VAE."""
    monkeypatch.setattr(".".join(place), fault)
    result = run("doctor")
    assert result.exit_code == 1 and "error: no picture by the model of the package: " in result.stderr
    assert text in result.stderr and "bold" not in result.stderr
    assert text in json.loads(run("doctor", "--json").stdout)["picture"]["problem"]


def test_versions_with_what_is_supported(no_self_test, monkeypatch):
    declared = ["torch>=2.5", "numpy>=99.1", "huggingface_hub>=0.34", 'diffusers>=0.37; extra == "diffusers"', "rich"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: declared)
    monkeypatch.setattr(doctor_picture, "draw", lambda _: doctor_picture.Drawn(seconds=1.0, difference=0))
    found = doctor.environment()
    assert found["torch"].startswith(f"{torch.__version__} (supported: 2.5 or newer), ")
    assert found["diffusers"].endswith(" (supported: 0.37 or newer)") and "supported" not in found["pillow"]
    result = run("doctor")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors == [f"error: numpy must be 99.1 or newer, got {doctor.metadata.version('numpy')}"]
    monkeypatch.setattr(doctor.metadata, "requires", no_package)
    assert doctor.too_old() == {} and run("doctor").exit_code == 0


def no_package(name):
    raise doctor.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("installed", "oldest", "older"),
    [
        ("2.5.1+cpu", "2.5", False), ("2.5", "2.5.0", False), ("2.4.9", "2.5", True), ("0.36.0", "0.37", True),
        ("2.10.0", "2.9", False), ("10.0", "10", False), ("5.0.0rc1", "5", False), ("0.43.0.dev0", "0.37", False),
    ],
)  # fmt: skip
def test_versions_in_order(installed, oldest, older, monkeypatch):
    monkeypatch.setattr(doctor, "oldest_supported", lambda: {"a": oldest})
    monkeypatch.setattr(doctor, "_installed", lambda _: installed)
    assert bool(doctor.too_old()) == older
