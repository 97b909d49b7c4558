"""Peak memory and time of loading a transformer of the released width, each time in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import BASELINE, OURS, Bar, Case, Settings, Timing, find, ratio

SUITE = "loading"
GOAL = 1.2
PACKAGES = {BASELINE: "diffusers", OURS: "qwen_image_fast.models.transformer"}

# Every page is touched after loading, within the time, so that a loader that maps the file pays for reading it as well.
LOAD = """
import importlib, json, re, sys, time
import torch
package, folder = sys.argv[1:]
cls = importlib.import_module(package).QwenImageTransformer2DModel
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = status("VmRSS")
start = time.perf_counter()
model = cls.from_pretrained(folder, torch_dtype=torch.bfloat16)
for p in model.parameters():
    p.detach().view(torch.int16).flatten()[::2048].sum()
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - before}))
"""


def write_transformer(folder: Path, layers: int, heads: int) -> int:
    """A bfloat16 transformer with arbitrary weights; returns their bytes."""
    from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=layers, num_attention_heads=heads).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.detach().uniform_(-0.01, 0.01)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def load(package: str, folder: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", LOAD, package, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cases(settings: Settings, layers: int = 3, heads: int = 24) -> Iterator[Case]:
    """Three layers are 2 GB. Needs Linux, which tells a process its peak memory."""
    samples: dict[str, list[float]] = {name: [] for name in PACKAGES}
    peaks: dict[str, list[float]] = {name: [] for name in PACKAGES}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "transformer"
        size = write_transformer(folder, layers, heads)
        for r in range(min(settings.rounds, 3)):
            for name in list(PACKAGES)[:: 1 if r % 2 == 0 else -1]:
                result = load(PACKAGES[name], folder)
                samples[name].append(result["seconds"])
                peaks[name].append(result["peak"])
    yield Case(
        SUITE, f"loading {size / 1e9:.2f} GB of bfloat16 weights",
        timings={n: Timing.of(s) for n, s in samples.items()}, speedups={OURS: ratio(samples, BASELINE, OURS)},
        bytes=size, memory={n: int(max(p)) for n, p in peaks.items()},
        tags={"layers": layers}, note="from the page cache; memory: peak above the imported packages",
    )  # fmt: skip


def bars(measured: list[Case]) -> list[Bar]:
    case = find(measured, SUITE)
    peak = None if case is None else case.memory[OURS] / case.bytes
    return [Bar("loading, peak memory over the size of the weights", GOAL, peak, at_most=True)]
