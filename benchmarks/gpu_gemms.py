"""The linear layers of a block on a GPU: both streams in one launch of the CUTLASS kernels against cuBLASLt.

    python -m benchmarks.gpu_gemms results.json

Each case is timed with what follows it in the model, so that both sides do the same work: cuBLASLt's products, then the
kernels of this package that finish them. The file is written after every case. `python -m benchmarks.linear_table`
makes the table of kernels from the results. The same layers in 8 bits, with the rounding of their inputs, are cases of
their own, by the kernels of `ops.int8_kernels`, and in float8. Without a GPU it runs torch's side, and 8 bits, on the
CPU, for tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_bench import Clock, cuda, device, write
from benchmarks.harness import difference
from qwen_image_fast import ops

# Image rows: a guidance pair at 512, 1024 and 1328 pixels, and single images; text rows: a short and a long pair.
IMG_ROWS = (1024, 2048, 4096, 8192, 13778)
TXT_ROWS = {1024: (50,), 2048: (80,), 4096: (50,), 8192: (80, 1024), 13778: (80,)}
KERNELS = ("cutlass large", "cutlass small")
INT8_KERNELS = ("mma.sync", "wgmma")
FLOAT8 = "float8 by mma.sync"
Call = Callable[[], Sequence[Tensor]]


class Layers:
    """A layer of each stream, with inputs, residuals and modulation vectors of two samples."""

    def __init__(self, rows: Sequence[int], depth: int, columns: int, count: int = 1):
        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device()) * scale).to(torch.bfloat16)

        self.x = [random(n, depth) for n in rows]
        self.weight = [random(columns, depth, scale=depth**-0.5) for _ in range(len(rows) * count)]
        self.bias = [random(columns) for _ in self.weight]
        self.residual = [random(n, columns) for n in rows]
        self.vectors = [[random(2, columns, scale=0.5) for _ in range(3)] for _ in rows]
        self.offsets = [torch.tensor([0, n // 2, n], device=device(), dtype=torch.int32) for n in rows]


def qkv(rows: Sequence[int], width: int) -> tuple[int, int, Call, Call]:
    layers = Layers(rows, width, width, 3)
    x = [layers.x[0]] * 3 + [layers.x[1]] * 3
    return (
        width,
        width,
        lambda: ops.linear_qkv(x, layers.weight, layers.bias),
        lambda: [F.linear(a, w, b) for a, w, b in zip(x, layers.weight, layers.bias)],
    )


def gelu(rows: Sequence[int], width: int) -> tuple[int, int, Call, Call]:
    layers = Layers(rows, width, 4 * width)
    arguments = layers.x, layers.weight, layers.bias
    return (
        width,
        4 * width,
        lambda: ops.linear_gelu(*arguments),
        lambda: [ops.gelu_tanh(F.linear(a, w, b), inplace=True) for a, w, b in zip(*arguments)],
    )


def gate_residual(rows: Sequence[int], width: int, depth: int) -> tuple[int, int, Call, Call]:
    """With the norm that follows: one pass over gate, residual and norm there, the norm alone here."""
    c = Layers(rows, depth, width)

    def ours() -> list[Tensor]:
        x = ops.linear_gate_residual(c.residual, c.x, c.weight, c.bias, [v[0] for v in c.vectors], c.offsets)
        return [*x, *(ops.layer_norm_modulate(t, v[1], v[2], o) for t, v, o in zip(x, c.vectors, c.offsets))]

    def theirs() -> list[Tensor]:
        pairs = [
            ops.gate_residual_norm_modulate(r, F.linear(a, w, b), *v, o)
            for r, a, w, b, v, o in zip(c.residual, c.x, c.weight, c.bias, c.vectors, c.offsets)
        ]
        return [x for x, _ in pairs] + [normed for _, normed in pairs]

    return depth, width, ours, theirs


CASES: dict[str, Callable[[Sequence[int], int], tuple[int, int, Call, Call]]] = {
    "linear_qkv": qkv,
    "linear_gelu": gelu,
    "linear_gate_residual, attention": lambda rows, width: gate_residual(rows, width, width),
    "linear_gate_residual, MLP": lambda rows, width: gate_residual(rows, width, 4 * width),
}


def in_8_bits(layers: Layers, gated: bool, float8: bool) -> Call:
    """All products of the layers in 8 bits, of inputs that are rounded once, with gate and residual or without."""
    group = next(g for g in (256, 64, 16) if layers.x[0].shape[1] % g == 0)
    of_each = len(layers.weight) // len(layers.x)
    with ops.eight_bits("int8"):
        made = [
            ops.Int8Weight.of((w.float() * 500).round().clamp(-127, 127).to(torch.int8), w.new_full((1,), 0.002), group)
            for w in layers.weight
        ]
    made = [w.in_float8() for w in made] if float8 else made
    rest = [layers.residual, [v[0] for v in layers.vectors], layers.offsets] if gated else []

    def run() -> list[Tensor]:
        rows = [r for x in layers.x for r in [ops.int8_rows(x, group, float8=float8)] * of_each]
        return ops.linear_int8(rows, made, layers.bias, torch.bfloat16, *rest)

    return run


# Depth and columns as multiples of the width, products of each stream, whether with gate and residual.
INT8_CASES = {
    "linear_qkv": (1, 1, 3, False),
    "linear_gelu": (1, 4, 1, False),
    "linear_gate_residual, attention": (1, 1, 1, True),
    "linear_gate_residual, MLP": (4, 1, 1, True),
}


def measured_8_bits(name: str, rows: Sequence[int], width: int, clock: Clock, rounds: int) -> dict[str, Any]:
    """As `measured`; `difference` is wgmma's from mma.sync, which is none, `float8 differs` that of float8."""
    depth, columns, count, gated = INT8_CASES[name]
    depth, columns = depth * width, columns * width
    flops = 2 * sum(rows) * depth * columns * count
    record: dict[str, Any] = {"op": "linear_int8", "label": f"8 bits, {name}", "rows": list(rows), "depth": depth,
                              "columns": columns, "flops": flops, "difference": {}, "ms": {}}  # fmt: skip
    layers, expected = Layers(rows, depth, columns, count), None
    with torch.no_grad():
        for kernels in (*(INT8_KERNELS if cuda() else ("best",)), FLOAT8):
            float8 = kernels == FLOAT8
            run = in_8_bits(layers, gated, float8)
            with ops.int8_kernels("best" if float8 else kernels):
                try:
                    found = run()
                    expected = expected or found
                    if float8:
                        record["float8 differs"] = difference(found, expected)
                    else:
                        record["difference"][kernels] = difference(found, expected)
                    record["ms"][kernels] = clock(run, rounds)
                except (RuntimeError, AttributeError) as error:  # not in this build, or not on this GPU
                    record.setdefault("errors", {})[kernels] = str(error)
    record["TFLOP/s"] = {kernels: flops / ms / 1e9 for kernels, ms in record["ms"].items()}
    return record


def gemms(width: int = 3072, img_rows: Sequence[int] = IMG_ROWS, rounds: int = 20) -> Iterator[dict[str, Any]]:
    clock = Clock()
    for n in img_rows:
        for txt in TXT_ROWS.get(n, (7,)):
            for name, make in CASES.items():
                yield measured(name, (n, txt), width, make, clock, rounds)
            for name in INT8_CASES:
                yield measured_8_bits(name, (n, txt), width, clock, rounds)


def measured(name: str, rows: Sequence[int], width: int, make: Callable, clock: Clock, rounds: int) -> dict[str, Any]:
    depth, columns, ours, theirs = make(rows, width)
    count = 2 * sum(rows) * depth * columns * (3 if name == "linear_qkv" else 1)
    record: dict[str, Any] = {"op": name.split(",")[0], "label": name, "rows": list(rows), "depth": depth,
                              "columns": columns, "flops": count, "difference": {}, "ms": {}}  # fmt: skip
    with torch.no_grad():
        record["ms"]["torch"] = clock(theirs, rounds)
        for kernel in KERNELS if cuda() else ("torch",):
            with ops.linear_kernels(kernel):
                try:
                    record["difference"][kernel] = difference(ours(), theirs())
                    record["ms"][kernel] = clock(ours, rounds)
                except RuntimeError as error:
                    record.setdefault("errors", {})[kernel] = str(error)
    record["TFLOP/s"] = {kernel: count / ms / 1e9 for kernel, ms in record["ms"].items()}
    return record


if __name__ == "__main__":
    write(gemms(), Path(sys.argv[1]))
