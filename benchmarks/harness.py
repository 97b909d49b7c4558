"""Interleaved timing of variants that compute the same thing, measured roofs, and what a report is made of.

Every round runs every variant once, in an order that rotates, so that a busy or throttled machine slows all of them;
a speed-up is the median of the ratios within the rounds. No speed-up exists where the results disagree.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Variants = Mapping[str, Callable[[], Any]]
BASELINE = "diffusers"
COMPILED = "diffusers compiled"
OURS = "ours"
# Larger than the caches of CPUs and GPUs; written between samples where a case is measured from memory.
EVICT_BYTES = 128 << 20
SHORTEST_SAMPLE = 2e-3
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    compile: also time torch.compile of the reference. seconds: after this long a case stops at five rounds or more.
    """

    device: str = "cpu"
    rounds: int = 15
    warmup: int = 2
    compile: bool = True
    seconds: float = 20.0
    quick: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


@dataclass
class Case:
    """One measured comparison.

    Attributes:
        suite, name: where it belongs; `tags` holds the same in parts (op, dtype, tokens, ...), for the bars.
        timings: per variant. speedups: baseline / variant, median over the rounds; empty where results disagree.
        difference: the largest deviation of a variant from the baseline, relative to the baseline's largest value
            (suites may define their own unit in `note`). tolerance: what is accepted.
        bytes, flops: moved and computed by one ideal pass. roof: roof time / variant time, where a "roof" variant, the
            same bytes or matrix products and nothing else, ran in the same rounds.
        memory: bytes, per variant: peak extra memory of one call, or what `note` says.
        stages: seconds of the parts of a variant. goals: speed-ups to reach.
    """

    suite: str
    name: str
    tags: dict[str, Any]
    timings: dict[str, Timing]
    speedups: dict[str, float]
    difference: float = 0.0
    tolerance: float = 0.0
    bytes: int | None = None
    flops: int | None = None
    roof: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Bar:
    """A goal: `measured` must be at least `goal` (`at_most`: at most). None: not measured in this run."""

    name: str
    goal: float
    measured: float | None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        reached = self.measured <= self.goal if self.at_most else self.measured >= self.goal
        return "reached" if reached else "missed"


@dataclass
class Report:
    date: str
    machine: dict[str, Any]
    roofs: dict[str, float]
    cases: list[Case]
    bars: list[Bar]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        data = json.loads(path.read_text(encoding="utf-8"))
        for case in data["cases"]:
            case["timings"] = {name: Timing(**t) for name, t in case["timings"].items()}
        data["cases"] = [Case(**case) for case in data["cases"]]
        data["bars"] = [Bar(**bar) for bar in data["bars"]]
        return cls(**data)


# ---- timing ---------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_call(fn: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds of one call, everything it launched included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def measure(variants: Variants, settings: Settings, cold: bool = False) -> dict[str, list[float]]:
    """Seconds per call of every variant in every round.

    Args:
        cold: overwrite the caches before each sample, which is then one call; otherwise short calls are repeated
            until a sample lasts 2 ms.
    """
    device = settings.device
    names, repeats = list(variants), {}
    for name, fn in variants.items():
        for _ in range(settings.warmup):
            fn()
        repeats[name] = 1 if cold else max(1, int(SHORTEST_SAMPLE / max(time_call(fn, device), 1e-7)))
    evict = torch.empty(EVICT_BYTES // 4, device=device) if cold else None
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for r in range(settings.rounds):
        if r >= FEWEST_ROUNDS and time.perf_counter() - start > settings.seconds:
            break
        first = r % len(names)
        for name in names[first:] + names[:first]:
            if evict is not None:
                evict.fill_(r)
            samples[name].append(time_call(variants[name], device, repeats[name]))
    return samples


def ratio(samples: Mapping[str, list[float]], over: str, under: str) -> float:
    """Median over the rounds of time(over) / time(under)."""
    return statistics.median(a / b for a, b in zip(samples[over], samples[under]))


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Iterable) and not isinstance(result, str):
        return [t for part in result for t in tensors(part)]
    return []


def difference(result: Any, reference: Any) -> float:
    """The largest relative deviation: max |a - b| / max |b| per tensor; infinite where shapes or counts differ."""
    ours, theirs = tensors(result), tensors(reference)
    if len(ours) != len(theirs) or not theirs:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs):
        if a.numel() != b.numel():
            return float("inf")
        a, b = a.detach().float().flatten(), b.detach().float().flatten()
        error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def compare(
    suite: str,
    name: str,
    variants: Variants,
    settings: Settings,
    *,
    tolerance: float,
    roof: Callable[[], Any] | None = None,
    measure_difference: Callable[[Any, Any], float] = difference,
    cold: bool = False,
    memory: bool = False,
    **fields: Any,
) -> Case:
    """Time variants against the first one, after checking that all of them give its result.

    Args:
        roof: a call that moves the same bytes or does the same matrix products; it runs in the same rounds.
        memory: also measure the peak extra memory of one call of each variant.
        fields: the remaining fields of `Case`.
    """
    baseline = next(iter(variants))
    reference = variants[baseline]()
    worst = max((measure_difference(fn(), reference) for n, fn in variants.items() if n != baseline), default=0.0)
    timed = dict(variants) if roof is None else {**variants, "roof": roof}
    samples = measure(timed, settings, cold)
    others = [n for n in variants if n != baseline]
    return Case(
        suite,
        name,
        timings={n: Timing.of(s) for n, s in samples.items()},
        speedups={n: ratio(samples, baseline, n) for n in others} if worst <= tolerance else {},
        difference=worst,
        tolerance=tolerance,
        roof={} if roof is None else {n: ratio(samples, "roof", n) for n in variants},
        memory={n: peak_extra_memory(fn, settings.device) for n, fn in variants.items()} if memory else {},
        **fields,
    )


def compiled(fn: Callable) -> Callable:
    """torch.compile with fixed shapes, from a clean state, so that one case does not see another's guards."""
    torch.compiler.reset()
    return torch.compile(fn, dynamic=False)


def peak_extra_memory(fn: Callable[[], Any], device: str) -> int:
    """Bytes by which one call raises the peak of allocated (CUDA) or resident (CPU on Linux, else 0) memory."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = resident_bytes("VmRSS")
    fn()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024


class stage_times:
    """Accumulates the seconds spent in methods of objects while it is entered.

    Args:
        stages: name -> (object, method name). The methods are wrapped on the objects for that time.
    """

    def __init__(self, device: str, stages: Mapping[str, tuple[object, str]]):
        self.device, self.stages = device, stages
        self.seconds = dict.fromkeys(stages, 0.0)

    def __enter__(self) -> dict[str, float]:
        for name, (owner, method) in self.stages.items():
            vars(owner)[method] = self._timed(name, getattr(owner, method))
        return self.seconds

    def __exit__(self, *_) -> None:
        for owner, method in self.stages.values():
            del vars(owner)[method]

    def _timed(self, name: str, fn: Callable) -> Callable:
        def timed(*args, **kwargs):
            result = []
            self.seconds[name] += time_call(lambda: result.append(fn(*args, **kwargs)), self.device)
            return result[0]

        return timed


# ---- the machine ----------------------------------------------------------------------------------------------------


def measure_roofs(settings: Settings) -> dict[str, float]:
    """`copy`: bytes per second read and written by a copy larger than the caches. `gemm <dtype>`: FLOP per second."""
    big = torch.empty((64 if settings.quick else 256) << 18, device=settings.device).fill_(1)
    target = torch.empty_like(big)
    roofs = {"copy": 2 * big.nbytes / best_time(lambda: target.copy_(big), settings)}
    n = 1024 if settings.quick else 2048
    for dtype in (torch.float32, torch.bfloat16) if settings.device.startswith("cuda") else (torch.float32,):
        a, b = (torch.randn(n, n, device=settings.device, dtype=dtype) for _ in range(2))
        roofs[f"gemm {dtype_name(dtype)}"] = 2 * n**3 / best_time(lambda a=a, b=b: torch.mm(a, b), settings)
    return roofs


def best_time(fn: Callable[[], Any], settings: Settings) -> float:
    """The shortest of several calls: a roof is what the machine can do, not what it does when busy."""
    fn()
    return min(time_call(fn, settings.device) for _ in range(max(3, settings.rounds)))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_machine(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers, without names of hosts or paths."""
    from qwen_image_fast import _C

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "transformers"):
        try:
            versions[package] = __import__(package).__version__
        except ImportError:
            versions[package] = "not installed"
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else processor_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions,
        "build_info": _C.build_info(),
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def find(cases: Iterable[Case], suite: str, **tags: Any) -> Case | None:
    """The case of a suite with these tags; None where it was not measured."""
    return next((c for c in cases if c.suite == suite and tags.items() <= c.tags.items()), None)


def speedup(case: Case | None, variant: str, over: str = BASELINE) -> float | None:
    """How much faster `variant` is than `over`; None where one was not measured or the results disagree."""
    if case is None or variant not in case.speedups:
        return None
    if over == BASELINE:
        return case.speedups[variant]
    return case.speedups[variant] / case.speedups[over] if over in case.speedups else None
