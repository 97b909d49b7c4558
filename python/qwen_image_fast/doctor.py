"""What this machine and this build are, whether every kernel agrees with its reference here, and how fast it is.

The rule of agreement, for results and gradients: measured against the reference in float64, an op errs at most twice
as much as the reference itself errs in that dtype, in the maximum and in the root mean square, plus half a unit in the
last place of the largest value.
"""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from qwen_image_fast import _C, doctor_libraries, ops
from qwen_image_fast.doctor_cases import ALLOWED, CASES, CPU_ONLY, as_tuple, functions, inputs
from qwen_image_fast.ops import _eight_bits
from qwen_image_fast.ops._linear import describe_linear
from qwen_image_fast.ops.joint_attention import describe_attention
from qwen_image_fast.ops.linear_int8 import multiplied_by

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Beside torch, those whose versions decide what works; the last three are wanted by the extra diffusers alone.
PACKAGES = ("transformers", "huggingface_hub", "safetensors", "numpy", "pillow", "diffusers", "accelerate", "peft")


# ---- the environment --------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Versions, CPU, build and GPU, as one line each."""
    info = _C.build_info()
    architectures = ", ".join(str(a) for a in info["cuda_architectures"]) or "none in this build"
    found = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{_version('torch', torch.__version__)}, {torch.get_num_threads()} threads",
        "threads": _threads(),
        "OpenMP": doctor_libraries.openmp(),
        "libraries": doctor_libraries.search_path(),
        "CPU capability of torch": torch.backends.cpu.get_cpu_capability(),
        "qwen-image-fast": f"{info['version']}, built with {info['compiler']}, {info['openmp_threads']} OpenMP threads",
        "CPU kernels": f"{', '.join(info['cpu_kernels'])} compiled; {info['cpu_in_use']} in use",
        "8-bit products": f"{', '.join(info['int8_units'])} on this CPU; {info['int8_units'][-1]} in use; on a GPU "
        + (_of_8_bits() if info["cuda_architectures"] else "none, as this build has no CUDA kernels"),
        "CUDA kernels": architectures,
        "CUDA": _cuda(),
    }
    attention = describe_attention("cuda" if torch.cuda.is_available() else "cpu")
    found |= {"attention, equal lengths": attention[0], "attention, mixed lengths": attention[1]}
    found["lengths of text of a CUDA graph"] = attention[2]
    found["linear layers"] = describe_linear("cuda" if torch.cuda.is_available() else "cpu")
    return found | {name: _version(name, _installed(name)) for name in PACKAGES}


def _of_8_bits() -> str:
    """What the tensor cores of the GPU are for, by the table of peaks."""
    if not torch.cuda.is_available():
        return "tensor cores"
    device = torch.cuda.current_device()
    return f"{_eight_bits.describe(_eight_bits.capability_of(device))}; by {multiplied_by(device)}"


def _threads() -> str:
    """How many there are, how they wait, which OpenMP's runtime read as it was loaded, and for whom."""
    told = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    waiting = " ".join(told) or "as OpenMP's runtime comes: they spin before they sleep"
    load, processors = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return f"{torch.get_num_threads()}; waiting: {waiting}; load {load:.1f} on {processors} processors"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch has CUDA {torch.version.cuda} but sees no device{_why_no_device()}"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(
        f"{d.name}, {d.total_memory / 1e9:.0f} GB, sm_{d.major}{d.minor}, {_kernels_for(d.major, d.minor)}"
        for d in devices
    )


def _why_no_device() -> str:
    """torch's own words where it has some: no driver, or one that is too old."""
    try:
        torch.cuda.init()
    except Exception as error:
        return f": {str(error).strip().splitlines()[0]}"
    return ""


def _kernels_for(major: int, minor: int) -> str:
    """What this build can do on a GPU of that compute capability."""
    built = _C.build_info()["cuda_architectures"]
    if any(runs_on(a, major, minor) for a in built):
        return "this build has kernels for it"
    if not built:
        return "built without CUDA: build from source with QIF_CUDA=ON for kernels on it"
    return f"no kernels for it: build from source with QIF_CUDA_ARCHITECTURES={major}{minor}"


def runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether machine code for sm_XY runs on that compute capability: the same X and no newer Y; with `a`, the same.

    `sm_XY+PTX` is no machine code: the driver compiles it for that generation and every later one.
    """
    name = re.fullmatch(r"sm_(\d+)(\d)([af]?)(\+PTX)?", architecture)
    if name is None:
        return False
    if name[4] and not name[3]:
        return (int(name[1]), int(name[2])) <= (major, minor)
    if int(name[1]) != major:
        return False
    return int(name[2]) == minor if name[3] == "a" else int(name[2]) <= minor


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def oldest_supported() -> dict[str, str]:
    """By package, as the installed wheel declares them; docs/versions.md tells what was tried."""
    try:
        declared = metadata.requires("qwen-image-fast") or ()
    except metadata.PackageNotFoundError:  # run from a source tree
        declared = ()
    found = (re.match(r"([\w-]+) ?>=([\w.]+)", line) for line in declared)
    return {match[1].replace("-", "_"): match[2] for match in found if match}


def too_old() -> dict[str, str]:
    """A sentence for each installed package that is older than what is supported."""
    found = {}
    for package, oldest in oldest_supported().items():
        installed = _installed(package)
        if installed is not None and _numbers(installed) < _numbers(oldest):
            found[package] = f"{package} must be {oldest} or newer, got {installed}"
    return found


def _version(package: str, installed: str | None) -> str:
    """With what is supported, where that is known."""
    if installed is None:
        return "not installed"
    oldest = oldest_supported().get(package)
    return f"{installed} (supported: {oldest} or newer)" if oldest else installed


def _numbers(version: str) -> tuple[int, ...]:
    """What comes before letters and `+`: of 2.5.1+cpu (2, 5, 1); zeros at the end do not count."""
    numbers = [int(n) for n in re.match(r"[\d.]*", version)[0].split(".") if n]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def has_cuda_kernels() -> bool:
    """Whether this build can run its ops on the GPU that torch sees."""
    if not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability()
    return any(runs_on(a, *capability) for a in _C.build_info()["cuda_architectures"])


# ---- self-test --------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """One op with one set of kernels in one dtype; `worst` is error / allowed error, `problem` None below 1."""

    op: str
    kernels: str
    dtype: str
    worst: float
    problem: str | None = None


def self_test() -> list[Verdict]:
    """Every op, forward and backward, with each set of kernels that this machine can run, in each dtype.

    The set of CPU kernels and torch's filling of new memory are the process's; other threads that run ops meanwhile get
    the same results, more slowly.
    """
    info = _C.build_info()
    sets = info["cpu_kernels"][: info["cpu_kernels"].index(info["cpu_best"]) + 1]
    variants = [("torch", "cpu"), *((s, "cpu") for s in sets)]
    if has_cuda_kernels():
        variants += [("cuda", "cuda"), ("cutlass", "cuda")]
    verdicts = []
    with _unwritten_is_nan():
        try:
            for kernels, device in variants:
                if kernels in sets:
                    _C.set_isa(kernels)
                for name, (_, own_kernels) in CASES.items():
                    if own_kernels != (kernels != "torch") if device == "cpu" else name in CPU_ONLY:
                        continue
                    if kernels == "cutlass" and not name.startswith("linear_"):
                        continue
                    dtypes = DTYPES if kernels != "cutlass" else DTYPES[1:]
                    with ops.linear_kernels("cutlass" if kernels == "cutlass" else "torch"):
                        verdicts += [_judge(name, kernels, device, dtype) for dtype in dtypes]
            if info["amx"]:  # for large products alone
                verdicts.append(_judge("linear_amx", "amx", "cpu", torch.float32, rows=2000, width=384))
        finally:
            _C.set_isa(info["cpu_in_use"])
    return verdicts


@contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    """torch.empty comes back as NaN, so that an element that a kernel never wrote is seen."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _judge(name: str, kernels: str, device: str, dtype: torch.dtype, rows: int = 45, width: int = 192) -> Verdict:
    kind = str(dtype).removeprefix("torch.")
    try:
        args = inputs(name, rows, width, dtype, device)
        times = ALLOWED.get(name, 2.0) if dtype == torch.float32 else 2.0
        worst, problem = _compare(*functions(name), args, times, same_bits=kernels != "torch")
    except Exception as error:  # a kernel that raises is a failed test, not a failed program
        worst, problem = math.inf, f"{type(error).__name__}: {error}"
    return Verdict(name, kernels, kind, worst, problem)


def _compare(op: Callable, reference: Callable, args: list, times: float, same_bits: bool) -> tuple[float, str | None]:
    exact_args = [_double(a) for a in args]
    runs = [(op, args), (reference, args), (reference, exact_args)]
    outs = [as_tuple(fn(*a)) for fn, a in runs]
    with torch.no_grad():
        direct = as_tuple(op(*(a.detach() if isinstance(a, Tensor) else a for a in args)))
    # torch may compute attention otherwise where gradients are wanted; kernels of this package may not.
    if same_bits and not all(torch.equal(a, b) for a, b in zip(direct, outs[0])):
        return math.inf, "the result with gradients differs from the one without"

    generator = torch.Generator().manual_seed(11)
    seeds = [torch.randn(o.shape, generator=generator) for o in outs[0]]
    grads = [_gradients(o, a, seeds) for o, (_, a) in zip(outs, runs)]
    named = [(f"result {i}", t) for i, t in enumerate(zip(*outs))]
    named += [(f"gradient {i}", t) for i, t in enumerate(zip(*grads))]
    worst, problem = 0.0, None
    for what, tensors in named:
        ours, own, exact = (t.detach() for t in tensors)
        for measure, error, allowed in _errors(ours, own, exact, times):
            ratio = 0.0 if error == 0 else error / allowed if allowed else math.inf
            if not ratio <= worst:  # also where it is NaN
                worst = math.inf if math.isnan(ratio) else ratio
                if worst > 1:
                    problem = f"{what}: {measure} error {error:.2e}, allowed {allowed:.2e}"
    return worst, problem


def _double(a: Any) -> Any:
    return a.detach().double().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a


def _gradients(outs: tuple[Tensor, ...], args: list, seeds: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return torch.autograd.grad(outs, inputs, [s.to(o) for s, o in zip(seeds, outs)])


def _errors(ours: Tensor, reference: Tensor, exact: Tensor, times: float = 2.0) -> Iterator[tuple[str, float, float]]:
    """(measure, error, allowed error) of one tensor."""
    eps = torch.finfo(ours.dtype).eps
    error, own = (ours.double() - exact).abs(), (reference.double() - exact).abs()
    for name, measure in (("max", torch.amax), ("rms", lambda t: t.pow(2).mean().sqrt())):
        yield name, measure(error).item(), (times * measure(own) + 0.5 * eps * measure(exact.abs())).item()


# ---- timing -----------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Median seconds of one piece of work, ours and the reference's; `gb_per_s` of ours where it is bound by memory."""

    name: str
    ours: float
    reference: float
    gb_per_s: float | None = None


def time_ops(rows: int, width: int, dtype: torch.dtype, repeats: int) -> list[Timing]:
    """Every op without gradients. Bytes are those that must move once: all inputs and all results."""
    timings = []
    bound = {name for name, (_, own_kernels) in CASES.items() if own_kernels} - {"conv3x3"}  # by memory
    for name in CASES:
        op, reference = functions(name)
        args = [a.detach() if isinstance(a, Tensor) else a for a in inputs(name, rows, width, dtype)]
        with torch.inference_mode():
            moved = sum(t.nbytes for t in (*args, *as_tuple(op(*args))) if isinstance(t, Tensor))
            ours, theirs = _interleaved(lambda: op(*args), lambda: reference(*args), repeats)  # noqa: B023
        timings.append(Timing(name, ours, theirs, moved / ours / 1e9 if name in bound else None))
    return timings


def time_transformer(tokens: int, width: int, dtype: torch.dtype, repeats: int) -> Timing:
    """One forward of a two-block transformer of random weights on a square image of about `tokens` tokens."""
    from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

    side = max(1, round(tokens**0.5))
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(7)
        sizes = {"attention_head_dim": 128, "num_attention_heads": width // 128, "joint_attention_dim": 512}
        model = QwenImageTransformer2DModel(num_layers=2, **sizes).to(dtype).eval()
        img, txt = torch.randn(1, side * side, 64, dtype=dtype), torch.randn(1, 32, 512, dtype=dtype)

        def step() -> None:
            model(img, txt, timestep=torch.tensor([0.5]), img_shapes=[[(1, side, side)]])

        def reference_step() -> None:
            with ops.reference():
                step()

        ours, theirs = _interleaved(step, reference_step, repeats)
    return Timing(f"transformer, 2 blocks of width {width}, {side * side} tokens", ours, theirs)


def _interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of both, called in turn, so that a slower spell of the machine meets both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeats + 1):
        for fn, into in ((first, seconds[0]), (second, seconds[1])):
            start = time.perf_counter()
            fn()
            if round_:  # the first round is for warming up
                into.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


# ---- output -----------------------------------------------------------------------------------------------------


def environment_table(found: dict[str, str]) -> Table:
    table = Table("what", "found", title="Environment", title_justify="left")
    for name, value in found.items():
        table.add_row(name, value)
    return table


def verdict_table(verdicts: list[Verdict]) -> Table:
    """One line per op, one column per set of kernels: the worst error as a share of what is allowed."""
    columns = list(dict.fromkeys(v.kernels for v in verdicts))
    table = Table("op", *columns, "verdict", title="Self-test: forward and gradients against the references")
    table.collapse_padding, table.title_justify = True, "left"
    table.caption = f"error / allowed error, worst of {', '.join(dict.fromkeys(v.dtype for v in verdicts))}"
    table.caption_justify = "left"
    for name in dict.fromkeys(v.op for v in verdicts):
        mine = [v for v in verdicts if v.op == name]
        cells = []
        for column in columns:
            there = [v for v in mine if v.kernels == column]
            style = "red" if any(v.problem for v in there) else "green"
            cells.append(f"[{style}]{max(v.worst for v in there):.2f}[/{style}]" if there else "")
        bad = any(v.problem for v in mine)
        table.add_row(name, *cells, "[red]DIFFERS[/red]" if bad else "[green]agrees[/green]")
    return table


def timing_table(timings: list[Timing], title: str) -> Table:
    table = Table("what", title=title, title_justify="left")
    for heading in ("ours", "reference", "ratio", "GB/s"):
        table.add_column(heading, justify="right")
    for t in timings:
        rate = "" if t.gb_per_s is None else f"{t.gb_per_s:.1f}"
        ours, reference = f"{t.ours * 1e3:.3f} ms", f"{t.reference * 1e3:.3f} ms"
        table.add_row(t.name, ours, reference, f"{t.reference / t.ours:.2f}x", rate)
    return table
