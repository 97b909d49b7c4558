"""Two blocks of the released width in 8 bits, and with weights in 4, beside what a CPU user has instead:

    python -m benchmarks.int8

All variants run in turn in one process on one thread, in seconds of processor time, which a neighbour disturbs least.
The roof is what a unit does on numbers in its registers, compiled with g++ where it is here, and measured in between.
Writes benchmarks/results/<date>-int8.json, or `--out`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import describe_machine
from qwen_image_fast import QwenImageTransformer2DModel
from qwen_image_fast.files import atomic_write
from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.models.precision import int8_layers
from qwen_image_fast.ops import Int8Weight, int8_rows, int8_unit, linear_int8
from qwen_image_fast.ops.linear_int8 import UNITS

CONFIG = {"num_layers": 2}
TEXT = 30
GRIDS = {256: (16, 16), 512: (32, 32)}
BARS = {256: 5.5, 512: 4.5}  # times as fast as diffusers in float32
ROOF_BAR, INT4_BAR = 0.55, 0.85
SMALL = {"ours int8": "int8", "ours int4": "int4"}
PRODUCTS = ((286, 3072, 3072), (286, 12288, 3072), (1054, 3072, 12288), (1054, 12288, 3072))  # rows, depth, columns
# What a unit does on numbers in its registers: a function of the times round, the operations of each, flags of g++.
ROOFS: dict[str, tuple[str, int, list[str]]] = {
    "amx": (
        r"""
#include <immintrin.h>
#include <cstdint>
struct alignas(64) Config { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16]; uint8_t rows[16]; };
extern "C" void products(long n) {
  static Config c;
  for (int i = 0; i < 16; i++) c.bytes[i] = i < 8 ? 64 : 0, c.rows[i] = i < 8 ? 16 : 0;
  asm volatile("" ::"r"(&c) : "memory");
  _tile_loadconfig(&c);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (long i = 0; i < n; i++) {
    _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 4, 7); _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
""",
        4 * 2 * 16 * 16 * 64,
        ["-mamx-tile", "-mamx-int8"],
    ),
    "avx512_vnni": (
        r"""
#include <immintrin.h>
#define P(x) asm volatile("vpdpbusd %1, %1, %0" : "+v"(x) : "v"(a));
extern "C" void products(long n) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
  __m512i m = a;
  for (; n > 0; n--) { P(b) P(c) P(d) P(e) P(f) P(g) P(h) P(i) P(j) P(k) P(l) P(m) }
}
""",
        12 * 2 * 16 * 4,
        ["-mavx512f"],
    ),
}


def roof(unit: str) -> Callable[[], float] | None:
    """Operations a second of a unit; None of one that is not in the table, or where there is no compiler."""
    if unit not in ROOFS or shutil.which("g++") is None:
        return None
    kept = tempfile.TemporaryDirectory()
    folder, (source, operations, flags) = Path(kept.name), ROOFS[unit]
    (folder / "roof.cpp").write_text(source)
    command = ["g++", "-O2", "-shared", "-fPIC", *flags, str(folder / "roof.cpp"), "-o", str(folder / "roof.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "roof.so"))

    def measure() -> float:
        assert kept  # what is loaded stays on the disk
        start, n = time.process_time(), 1_000_000
        library.products(ctypes.c_long(n))
        return n * operations / (time.process_time() - start)

    return measure


def models() -> dict[str, Any]:
    """One set of random weights in all variants."""
    import diffusers
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    torch.manual_seed(0)
    with torch.device("meta"):
        theirs = diffusers.QwenImageTransformer2DModel(**CONFIG)
        ours = {name: QwenImageTransformer2DModel(**CONFIG) for name in ("ours float32", "ours bfloat16", *SMALL)}
    state = {}
    for name, t in theirs.state_dict().items():
        bound = (3 / t.shape[-1]) ** 0.5
        state[name] = torch.empty(t.shape).uniform_(-bound, bound)
        if "norm" in name and t.dim() == 1 and name.endswith("weight"):
            state[name].fill_(1.0)
    small = {name: t.bfloat16() for name, t in state.items()}
    theirs.load_state_dict(state, assign=True)
    with torch.device("meta"):
        half = diffusers.QwenImageTransformer2DModel(**CONFIG)
    half.load_state_dict(small, assign=True)
    for model in (theirs, half):  # its tables are no part of the state
        model.pos_embed = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
    ours["ours float32"].load_state_dict(state, assign=True)
    for name in ("ours bfloat16", *SMALL):
        ours[name].load_state_dict(small, assign=True)
    for name, precision in SMALL.items():
        model = ours[name]
        for path, layer in int8_layers(model).items():
            parent, _, last = path.rpartition(".")
            made = quantised(layer.weight, precision=precision)
            setattr(model.get_submodule(parent), last, Int8Linear(made, layer.bias))
    found = {"diffusers float32": theirs, "diffusers bfloat16": half, **ours}
    return {name: m.eval() for name, m in found.items()}


def step(name: str, model: Any, grid: tuple[int, int]) -> Callable[[], torch.Tensor]:
    """One forward pass; ours with the modulation vectors of the schedule at hand, as their pipelines have them."""
    g = torch.Generator().manual_seed(1)
    dtype = model.proj_out.weight.dtype
    x = torch.randn(1, grid[0] * grid[1], 64, generator=g).to(dtype)
    text = torch.randn(1, TEXT, 3584, generator=g).to(dtype)
    t = torch.tensor([0.5], dtype=dtype)
    call = {"hidden_states": x, "encoder_hidden_states": text, "timestep": t, "img_shapes": [[(1, *grid)]]}
    if name.startswith("ours"):
        with torch.no_grad():
            vectors = model.sample_modulation(t)
        model.modulation_of = lambda *_: vectors
    else:
        call["encoder_hidden_states_mask"] = torch.ones(1, TEXT, dtype=torch.int64)
    return lambda: model(**call, return_dict=False)[0]


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each call, one after another in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return seconds


def steps(found: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    results = []
    for side, grid in GRIDS.items():
        calls = {name: step(name, model, grid) for name, model in found.items()}
        for unit in UNITS[-2:-1]:  # what the same machine does without its best
            calls[f"ours int8, {unit}"] = with_unit(unit, calls["ours int8"])
        exact, ours = calls["diffusers float32"]().double(), {name: calls[name]().double() for name in SMALL}
        seconds = in_turn(calls, rounds)
        base = seconds["diffusers float32"]
        ratios = {n: statistics.median(a / b for a, b in zip(base, s)) for n, s in seconds.items()}
        errors = {n: ((y - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item() for n, y in ours.items()}
        shares = [a / b for a, b in zip(seconds["ours int8"], seconds["ours int4"])]
        results.append(
            {
                "pixels": side, "tokens": grid[0] * grid[1] + TEXT, "bar": BARS[side], "relative_error": errors,
                "int4_as_fast_as_int8": statistics.median(shares),
                "seconds": {n: {"median": statistics.median(s), "least": min(s)} for n, s in seconds.items()},
                "times_diffusers_float32": ratios,
            }
        )  # fmt: skip
        print(f"{side} px: " + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items()), flush=True)
    return results


def with_unit(unit: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with int8_unit(unit):
            return call()

    return run


def products(rounds: int, unit: str) -> list[dict[str, Any]]:
    """The products of a block alone on a unit, and what rounds their rows, beside the roof."""
    peak, results = roof(unit), []
    for rows, depth, columns in PRODUCTS:
        weights = [
            Int8Weight.of(torch.randint(-127, 128, (columns, depth), dtype=torch.int8), torch.rand(columns), 256)
            for _ in range(3)  # none is in a cache when its turn comes
        ]
        four = [Int8Weight.of_floats(torch.randn(columns, depth), 256) for _ in range(3)]
        x, bias = torch.randn(rows, depth).bfloat16(), torch.randn(columns).bfloat16()
        taken = int8_rows(x, 256)
        operations = 2 * rows * depth * columns
        rates, roofs, rounding, fours = [], [], [], []
        for i in range(3 * rounds):
            for found, weight in ((rates, weights[i % 3]), (fours, four[i % 3])):
                start = time.process_time()
                with int8_unit(unit):
                    linear_int8([taken], [weight], [bias], torch.bfloat16)
                found.append(operations / (time.process_time() - start))
            start = time.process_time()
            int8_rows(x, 256)
            rounding.append(x.numel() / (time.process_time() - start))
            if peak is not None:
                roofs.append(peak())
        one = {"rows": rows, "depth": depth, "columns": columns, "unit": unit}
        one |= {"operations_per_second": statistics.median(rates), "rounded_per_second": statistics.median(rounding)}
        one["int4_as_fast_as_int8"] = statistics.median(b / a for a, b in zip(rates, fours))
        if peak is not None:
            one |= {"roof": statistics.median(roofs), "share": statistics.median(a / b for a, b in zip(rates, roofs))}
        results.append(one)
        rate = f"int4 {one['int4_as_fast_as_int8']:.2f} as fast as int8, {one['operations_per_second'] / 1e12:.2f} Tops"
        print(f"{unit}, {rows} x {depth} x {columns}: {rate}, share of the roof {one.get('share')}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine("cpu")
    with torch.no_grad():
        found = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "rounds": given.rounds}
        found["products"] = [one for unit in UNITS[:-3:-1] for one in products(given.rounds, unit)]
        gc.collect()
        found["steps"] = steps(models(), given.rounds)
    share = [p["share"] for p in found["products"] if "share" in p and p["unit"] == UNITS[-1]]
    reached = {f"{s['pixels']} px": s["times_diffusers_float32"]["ours int8"] >= s["bar"] for s in found["steps"]}
    reached["int4"] = min(s["int4_as_fast_as_int8"] for s in found["steps"]) >= INT4_BAR
    if share:
        reached["share of the roof"] = min(share) >= ROOF_BAR
    found["reached"] = reached
    print(reached)
    path = given.out or Path(f"benchmarks/results/{found['date']}-int8.json")
    atomic_write(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
    print(path)


if __name__ == "__main__":
    main()
