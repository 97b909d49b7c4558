"""Attention in bfloat16 on the tile unit of a CPU, against torch's kernel; alone, and in a block of the released width.

    python -m benchmarks.attention_amx [--rounds 7] [--out RESULTS.json]

All variants run in turn in one process on one thread, in seconds of processor time. Without the unit there is nothing
to measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.bench_block import BlockPair
from benchmarks.harness import describe_machine
from benchmarks.int8 import in_turn
from qwen_image_fast.files import atomic_write
from qwen_image_fast.models.transformer_block import run_block
from qwen_image_fast.ops import _attention_amx, joint_attention

TEXT, HEADS, HEAD_DIM = 30, 24, 128
SIDES = (256, 512, 1024)
ATTENTION_BAR, BLOCK_BAR = 1.8, 1.2  # at 1024 px


def attention(side: int) -> dict[str, Callable[[], Any]]:
    rows = (side // 16) ** 2 + TEXT
    q, k, v = (torch.randn(rows, HEADS, HEAD_DIM).bfloat16() for _ in range(3))
    batched = [t.transpose(0, 1)[None] for t in (q, k, v)]
    return {
        "torch": lambda: F.scaled_dot_product_attention(*batched),
        "ours": lambda: joint_attention(q, k, v, [rows]),
    }


def block(side: int) -> dict[str, Callable[[], Any]]:
    """diffusers' block; ours with either kernel of attention."""
    pair = BlockPair("cpu", HEADS, (side // 16, side // 16), TEXT, dtype=torch.bfloat16)
    pair.normalise()

    def ours(unit: bool) -> Any:
        before, _attention_amx.AVAILABLE = _attention_amx.AVAILABLE, unit
        try:
            return pair.run_ours(run_block, pair.mods)
        finally:
            _attention_amx.AVAILABLE = before

    return {
        "diffusers": lambda: pair.run_diffusers(pair.theirs),
        "ours, torch's attention": lambda: ours(False),
        "ours": lambda: ours(True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not _attention_amx.AVAILABLE:
        raise SystemExit(
            "attention_amx: this CPU has no tile unit for bfloat16 (AMX), or this build has no kernel for it"
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for side in SIDES:
            flops = 4 * ((side // 16) ** 2 + TEXT) ** 2 * HEADS * HEAD_DIM
            for what, over, calls in (("attention", "torch", attention(side)), ("block", "diffusers", block(side))):
                seconds = in_turn(calls, args.rounds)
                times = {name: statistics.median(t) for name, t in seconds.items()}
                row: dict[str, Any] = {"seconds": {name: round(t, 5) for name, t in times.items()}}
                row["times as fast"] = {name: round(ratios(seconds, over, name), 2) for name in times if name != over}
                if what == "attention":
                    row["gflops"] = {name: round(flops / t / 1e9) for name, t in times.items()}
                else:
                    row["times as fast as with torch's attention"] = round(
                        ratios(seconds, "ours, torch's attention", "ours"), 2
                    )
                found[f"{what}, {side} px"] = row
                print(f"{what}, {side} px: {row}", flush=True)
    reached = {
        "attention at 1024 px": found["attention, 1024 px"]["times as fast"]["ours"] >= ATTENTION_BAR,
        "block at 1024 px": found["block, 1024 px"]["times as fast as with torch's attention"] >= BLOCK_BAR,
    }
    print(f"goals: {reached}")
    if args.out:
        record = {
            "machine": describe_machine("cpu"),
            "threads": 1,
            "rounds": args.rounds,
            "measured": found,
            "goals": reached,
        }
        text = json.dumps(record, indent=1) + "\n"
        atomic_write(args.out, lambda file: file.write(text.encode()))


def ratios(seconds: dict[str, list[float]], over: str, name: str) -> float:
    """Median of the ratios of each round: a round's two follow each other."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[name]))


if __name__ == "__main__":
    main()
