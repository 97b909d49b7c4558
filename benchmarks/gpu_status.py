"""docs/gpu-status.md from the results files of `gpu_check`: what has run on a GPU, and what has not.

python -m benchmarks.gpu_status [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_model
from benchmarks.gpu_check import RESULTS, ROOT, STAGES
from benchmarks.gpu_model import table

TARGET = ROOT / "docs" / "gpu-status.md"
HEAD = """# What has run on a GPU

Written by `make gpu-status` from the files that `make gpu-check` leaves under `benchmarks/results/`.
"""
NOTHING = """
Nothing yet: no results file of a GPU exists. Until one does, what is known of the CUDA kernels (those that
[budget.json](../tests/compile_cuda/budget.json) names) is that nvcc compiles them for sm_80, sm_90a and sm_100a,
products of float8 for sm_89 in the place of sm_80, without spills (`make cuda-compile`), that a build for the three
links and can be imported without a driver, and that they pass the op tests on an emulator on the CPU
(`tests/emulator`), with accesses to memory and barriers checked. No time and no
bandwidth has been measured on a GPU; [an estimate](#an-estimate-for-an-h200-not-a-measurement) stands below.

The kernels made from CUTLASS's templates (`csrc/cutlass_kernels`), which the emulator does not run, and our own once
more, run as nvcc compiled them on an interpreter of PTX (`tests/ptx`): they compute the right thing there, and
nothing that it watches for happens ([architecture.md](architecture.md)). So it is with `conv2d`, the VAE's
convolution with bias and residual, and its table, which is empty: cuDNN computes all of them until a GPU has measured
which is faster. The linear kernels are off unless `ops.linear_kernels("cutlass")` asks for them.
"""
FOOT = """
Several GPUs, for training and for pictures ([distributed.md](distributed.md)), are tested with gloo on CPUs. NCCL, and
every speed of several GPUs, is beyond `make gpu-check`, which uses one: nothing on this page will speak of them.

To fill this page in: on a machine with a GPU, nvcc and a CUDA build of torch run `make gpu-check`, then
`make gpu-status`. It takes less than eight minutes; every stage has a share of them, and the results file is written
after each, with `gpu-check.log` beside it. `GPU_OUTPUT=FOLDER` puts both into a folder, and with `GPU_RESUME=--resume`
the stages that have passed there on the same day are left out. Without a network there, run `make gpu-wheels` elsewhere
first (`GPU_PYTHON=3.12` names the Python of that machine) and take the folder `gpu-wheels` along: it holds all that is
needed besides torch, CMake and CUTLASS's headers among it, in 95 MB; with `GPU_HAS='cmake numpy pillow transformers'`
30 MB are left. What is installed there is kept where it is new enough. `python -m benchmarks.gpu_check build ops
training` runs some stages alone.
"""


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results of GPUs, newest first; other files there are of CPUs."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    return sorted((r for r in found if "stages" in r), key=lambda r: r["date"], reverse=True)


def describe(r: dict[str, Any]) -> str:
    text = f"\n## {r['gpu']}, {r['date']}\n\ntorch {r['torch']}, CUDA {r['nvcc']}, driver {r['driver']}.\n"
    rows = []
    for stage in STAGES[1:]:
        record = r["stages"].get(stage.name)
        rows.append(
            [stage.name, record["status"], record.get("summary", "")] if record else [stage.name, "not run", ""]
        )
    text += table(["stage", "result", ""], rows)
    if r.get("ops"):
        rows = [
            [c["op"], c["dtype"], c["label"], f"{c['forward GB/s']:.0f}", f"{c['forward of copy']:.0%}",
             f"{c['backward of copy']:.0%}"]
            for c in r["ops"] if "forward GB/s" in c
        ]  # fmt: skip
        text += table(["op", "dtype", "size", "forward GB/s", "of a copy", "backward, of a copy"], rows)
        text += tflops([c for c in r["ops"] if "forward TFLOP/s" in c])
    if r.get("gemms"):
        names = list(dict.fromkeys(n for c in r["gemms"] for n in c["TFLOP/s"]))
        rows = [
            [c["label"], " + ".join(map(str, c["rows"])), f"{c['depth']} -> {c['columns']}",
             *(f"{c['TFLOP/s'][n]:.0f}" if n in c["TFLOP/s"] else "" for n in names)]
            for c in r["gemms"]
        ]  # fmt: skip
        text += "\nLinear layers of both streams with what follows them, TFLOP/s of the products:\n"
        text += table(["op", "rows", "size", *names], rows)
    for record in r["stages"].values():
        text += "".join(f"\n- {failure}" for failure in record.get("failures", ()))
    if r.get("block"):
        text += "\nOne block, ms:\n" + milliseconds(with_compiled(r, "block", "block ms"), "block ms")
    if r.get("transformer"):
        count = r["transformer"][0]["layers"]
        text += f"\nThe transformer, {count} layers, both branches of guidance, ms:\n"
        text += milliseconds(with_compiled(r, "transformer", "pair ms"), "pair ms")
    images = [c for c in r.get("vae", []) if c["task"] != "layer"]
    if images:
        rows = [
            [c["task"], str(c["pixels"]), f"{c['ms']['ours']:.1f}", f"{c['ms']['diffusers']:.1f}", f"{c['times']:.2f}",
             f"{c['TFLOP/s']:.0f}" if "TFLOP/s" in c else ""]
            for c in images
        ]  # fmt: skip
        text += f"\nThe VAE, one image in {images[0]['dtype']}:\n"
        text += table(["", "pixels", "ms", "diffusers, ms", "times", "TFLOP/s"], rows)
    layers = [c for c in r.get("vae", []) if c["task"] == "layer"]
    if layers:
        rows = [[c["label"], *(f"{c['TFLOP/s'][k]:.0f}" for k in ("torch", "cutlass"))] for c in layers]
        text += table(["convolution of the VAE", "cuDNN, TFLOP/s", "CUTLASS, TFLOP/s"], rows)
    for c in r.get("training", []):
        shares = ", ".join(f"{n} {v:.0%}" for n, v in c.get("MFU", {}).items()) or "unknown for this GPU"
        text += f"\nTraining step of {c['layers']} layers at {c['pixels']} pixels: model FLOP utilisation {shares}.\n"
    return text


def columns(cases: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(n for c in cases for n in c[key]))


def cells(case: dict[str, Any], key: str, names: list[str], digits: int) -> list[str]:
    return [f"{case[key][n]:.{digits}f}" if n in case[key] else "" for n in names]


def milliseconds(cases: list[dict[str, Any]], key: str) -> str:
    names = columns(cases, key)
    return table(["pixels", *names], [[str(c["pixels"]), *cells(c, key, names, 1)] for c in cases])


def with_compiled(r: dict[str, Any], suite: str, key: str) -> list[dict[str, Any]]:
    """The cases of a suite, with what the last stage measured of compiled code."""
    compiled = {c["pixels"]: c[key] for c in r.get("compiled", []) if key in c}
    return [{**c, key: {**compiled.get(c["pixels"], {}), **c[key]}} for c in r.get(suite, [])]


def tflops(cases: list[dict[str, Any]]) -> str:
    """Of attention, forward and backward, and which of torch's kernels ran."""
    if not cases:
        return ""
    names = columns(cases, "forward TFLOP/s")
    rows = [
        [c["op"], c["dtype"], c["label"], *cells(c, "forward TFLOP/s", names, 0),
         *cells(c, "backward TFLOP/s", names, 0), ", ".join(c.get("kernels", ()))]
        for c in cases
    ]  # fmt: skip
    heads = [f"{d} TFLOP/s, {n}" for d in ("forward", "backward") for n in names]
    return table(["op", "dtype", "size", *heads, "kernels"], rows)


def not_shown(found: list[dict[str, Any]]) -> str:
    """What no stage of any GPU has shown."""
    passed = {name for r in found for name, stage in r["stages"].items() if stage["status"] == "passed"}
    left = [s for s in STAGES[2:] if s.name not in passed]
    if not left:
        return ""
    return "\n## Not yet shown on a GPU\n" + table(["stage", "what it shows"], [[s.name, s.shows] for s in left])


def pair(r: dict[str, Any], pixels: int) -> dict[str, float]:
    """Milliseconds of both branches of guidance, by implementation."""
    cases = with_compiled(r, "transformer", "pair ms")
    return next((c["pair ms"] for c in cases if c["pixels"] == pixels), {})


def branch(r: dict[str, Any], pixels: int) -> float | None:
    """Milliseconds of ours for one branch, the faster way."""
    return min((t / 2 for n, t in pair(r, pixels).items() if n.startswith("ours")), default=None)


def times_faster(r: dict[str, Any], than: str) -> float | None:
    ours, theirs = branch(r, 1024), pair(r, 1024).get(than)
    return theirs / 2 / ours if ours and theirs else None


def least_of_copy(r: dict[str, Any]) -> float | None:
    """Of the ops that a block runs, in bfloat16, forward and backward."""
    cases = [c for c in r.get("ops", []) if c["op"] in BLOCK_OPS and c["dtype"] == "bfloat16"]
    return min((100 * c[f"{d} of copy"] for c in cases for d in ("forward", "backward")), default=None)


def sanitizers_failed(r: dict[str, Any]) -> float | None:
    """None where one did not run to its end: it was not there, or out of time."""
    stages = [r["stages"][s] for s in ("memcheck", "racecheck") if s in r["stages"]]
    failed = [s for s in stages if s["status"] == "failed" and s.get("output", "").startswith("exit status")]
    ended = len(failed) + sum(s["status"] == "passed" for s in stages)
    return float(len(failed)) if ended == 2 else None


BLOCK_OPS = ("layer_norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "gelu_tanh")
# What is aimed at on an H200: words, at most or at least how much, and how a results file answers.
BARS: list[tuple[str, str, float, Callable[[dict[str, Any]], float | None]]] = [
    ("1024 pixels, one branch of guidance, ms", "at most", 115, lambda r: branch(r, 1024)),
    ("512 pixels, one branch of guidance, ms", "at most", 32, lambda r: branch(r, 512)),
    ("1024 pixels, times as fast as diffusers", "at least", 1.5, lambda r: times_faster(r, "diffusers")),
    ("1024 pixels, times as fast as diffusers compiled", "at least", 1.15,
     lambda r: times_faster(r, "diffusers compiled")),
    ("slowest fused op at 4096 x 3072, % of the speed of a copy", "at least", 88, least_of_copy),
    ("tools of compute-sanitizer that found something", "at most", 0, sanitizers_failed),
    ("build on 16 cores, s", "at most", 70, lambda r: r["stages"].get("build", {}).get("seconds")),
]  # fmt: skip


def bars(found: list[dict[str, Any]]) -> str:
    """What the newest results of an H200 say of each bar."""
    on_h200 = [r for r in found if "H200" in r["gpu"]]
    rows = []
    for words, sense, limit, answer in BARS:
        value = next((v for v in map(answer, on_h200) if v is not None), None)
        met = value is not None and (value <= limit if sense == "at most" else value >= limit)
        rows.append([words, f"{sense} {limit:g}", "not measured" if value is None else f"{value:.4g}",
                     "" if value is None else "met" if met else "missed"])  # fmt: skip
    return "\n## Bars on an H200\n" + table(["", "bar", "measured", ""], rows)


def page(found: list[dict[str, Any]]) -> str:
    known = "".join(map(describe, found)) if found else NOTHING
    return HEAD + known + bars(found) + gpu_model.section(found) + not_shown(found) + FOOT


def main() -> int:
    text = page(results())
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.read_text(encoding="utf-8") == text else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
