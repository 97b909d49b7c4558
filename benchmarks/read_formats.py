"""How fast weights of each format become bfloat16 on one thread: decoding, the check that all is finite, the copy.

    python -m benchmarks.read_formats --out results.json

Processor time, medians of interleaved rounds, a weight of 3072 x 3072; reading the bytes comes before
(`benchmarks/bench_loading.py`). Where the `gguf` package is installed, its own decoding to float32 is beside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import processor_name
from qwen_image_fast.weights import nunchaku, scales
from qwen_image_fast.weights.bitsandbytes import _decoder
from qwen_image_fast.weights.gguf_types import BLOCK_TYPES
from qwen_image_fast.weights.reading import CHUNK, is_finite

SIDE = 3072
CHUNKS = 8  # one after another, as in a weight
Decode = Callable[[dict[str, Tensor], int, torch.dtype], Tensor]


def formats() -> dict[str, tuple[Decode, dict[str, Tensor], int]]:
    """What decodes a chunk, the stored tensors of a chunk, and its values."""
    rows = CHUNK // SIDE
    q = torch.randint(-127, 128, (rows, SIDE), dtype=torch.int8)
    half = torch.randint(-127, 128, (rows, SIDE // 2), dtype=torch.int8)
    row = torch.full((rows, 1), 0.01)
    float8 = torch.randn(rows, SIDE).to(torch.float8_e4m3fn)
    grouped = {"weight": half, "s_rel": torch.ones(rows, SIDE // 16).to(torch.float8_e4m3fn)}
    grouped |= {"s_channel": row[:, 0], "codebook": torch.linspace(-1, 1, 16)}
    blocks = CHUNK // 64
    nf4 = {"weight": torch.randint(0, 256, (blocks, 32), dtype=torch.uint8), "quant_map": torch.linspace(-1, 1, 16)}
    nf4 |= {"absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8), "nested_absmax": torch.ones(blocks // 256)}
    nf4 |= {"nested_quant_map": torch.linspace(0, 1, 256)}
    tile, rank = nunchaku.TILE, 32
    svdquant = {"weight": torch.randint(-128, 128, (1, tile * SIDE // 2), dtype=torch.int8)}
    svdquant |= {"scale": torch.ones(1, tile * SIDE // 64), "smooth": torch.ones(SIDE)}
    svdquant |= {"up": torch.ones(tile // 16, 16 * rank), "down": torch.ones(SIDE, rank)}
    size = rows * SIDE
    found: dict[str, tuple[Decode, dict[str, Tensor], int]] = {
        "float8 scaled": (scales.per_tensor, {"weight": float8, "scale": torch.tensor(0.01)}, size),
        "float8 rows": (scales.per_block, {"weight": float8, "scale": row}, size),
        "int8 rows": (scales.per_block, {"weight": q, "scale": row}, size),
        "int8 rotated 256": (scales.rotated(256), {"weight": q, "scale": row}, size),
        "int4 groups, rotated 256": (scales.grouped(SIDE, 4, 16, 256), grouped, size),
        "bitsandbytes nf4": (_decoder(256, 0.1), nf4, CHUNK),
        "nunchaku int4": (nunchaku.decode, svdquant, nunchaku.TILE * SIDE),
    }
    for block in BLOCK_TYPES.values():
        # Without the highest bit of an exponent every scale is finite.
        packed = torch.randint(0, 256, (CHUNK // block.values, block.size), dtype=torch.uint8) & 0xBF
        found[f"GGUF {block.name}"] = (
            lambda parts, first, dtype, block=block: block.decode(parts["weight"]).to(dtype),
            {"weight": packed},
            CHUNK,
        )
    return found


def by_gguf() -> dict[str, Callable[[], object]]:
    if find_spec("gguf") is None:
        return {}
    from gguf import GGMLQuantizationType, quants

    calls = {}
    for number, block in BLOCK_TYPES.items():
        packed = (torch.randint(0, 256, (CHUNK // block.values, block.size), dtype=torch.uint8) & 0xBF).numpy()
        calls[f"GGUF {block.name}"] = lambda p=packed, n=number: quants.dequantize(p, GGMLQuantizationType(n))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = formats(), by_gguf()
    out = torch.empty(max(size for _, _, size in ours.values()), dtype=torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in ours}
    beside: dict[str, list[float]] = {name: [] for name in theirs}
    for _ in range(options.rounds):
        for name, (decode, parts, size) in ours.items():
            start = time.process_time()
            for _ in range(CHUNKS):
                values = decode(parts, 0, torch.bfloat16)
                assert is_finite(values)
                out[:size].copy_(values.reshape(-1))
            seconds[name].append((time.process_time() - start) / CHUNKS)
        for name, call in theirs.items():
            start = time.process_time()
            call()
            beside[name].append(time.process_time() - start)
    results = {}
    for name, samples in seconds.items():
        _, parts, size = ours[name]
        median = statistics.median(samples)
        stored = sum(t.nbytes for t in parts.values())
        results[name] = {
            "million_values_per_second": round(size / median / 1e6),
            "stored_gb_per_second": round(stored / median / 1e9, 3),
            "bfloat16_gb_per_second": round(2 * size / median / 1e9, 2),
        }
        if name in beside:
            results[name]["gguf_million_values_per_second"] = round(CHUNK / statistics.median(beside[name]) / 1e6)
    about = {
        "date": str(datetime.date.today()),
        "cpu": processor_name(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "rounds": options.rounds,
        "threads": 1,
        "time": "of the processor",
    }
    options.out.write_text(json.dumps({**about, "formats": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
