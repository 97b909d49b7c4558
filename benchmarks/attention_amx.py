"""Attention in bfloat16 on the tile unit of a CPU, against torch's kernel; alone, and in a block of the released width.

    python -m benchmarks.attention_amx [--rounds 7] [--out RESULTS.json]

Both also with their gradients: of q, k and v, and of what enters the block, whose weights are frozen as for a LoRA. All
variants run in turn in one process on one thread, in seconds of processor time. Without the unit there is nothing to
measure.
"""

from __future__ import annotations

import argparse
import itertools
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
BACKWARD = 3.5  # products of a pass with gradients over those of one without: two, and five


def attention(side: int, gradients: bool) -> dict[str, Callable[[], Any]]:
    rows = (side // 16) ** 2 + TEXT
    q, k, v, seed = (torch.randn(rows, HEADS, HEAD_DIM).bfloat16() for _ in range(4))
    operands = [t.requires_grad_(gradients) for t in (q, k, v)]

    def torchs() -> Any:
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in operands))
        return with_gradients(out[0].transpose(0, 1), operands, seed) if gradients else out

    def ours() -> Any:
        out = joint_attention(q, k, v, [rows])
        return with_gradients(out, operands, seed) if gradients else out

    return {"torch": torchs, "ours": ours}


def with_gradients(out: torch.Tensor, of: list[torch.Tensor], seed: torch.Tensor) -> Any:
    return torch.autograd.grad(out, of, seed, allow_unused=True)


def block(side: int, gradients: bool) -> dict[str, Callable[[], Any]]:
    """diffusers' block; ours with either kernel of attention."""
    pair = BlockPair("cpu", HEADS, (side // 16, side // 16), TEXT, dtype=torch.bfloat16)
    pair.normalise()
    pair.theirs.requires_grad_(False), pair.ours.requires_grad_(False)
    mods = tuple(type(mod)(*(t.detach() for t in mod)) for mod in pair.mods)
    inputs = [pair.img, pair.text]
    if gradients:
        pair.img_normed, pair.text_normed = pair.img_normed.detach(), pair.text_normed.detach()
        inputs += [pair.img_normed, pair.text_normed]
    for t in inputs:
        t.requires_grad_(gradients)
    seed = torch.randn(pair.rows, pair.width).bfloat16()

    def through(streams: Any) -> Any:
        return with_gradients(streams[1], inputs, seed) if gradients else streams

    def ours(unit: bool) -> Any:
        before, _attention_amx.AVAILABLE = _attention_amx.AVAILABLE, unit
        try:
            return through(pair.run_ours(run_block, mods))
        finally:
            _attention_amx.AVAILABLE = before

    return {
        "diffusers": lambda: through(pair.run_diffusers(pair.theirs)),
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
    for gradients, side in itertools.product((False, True), SIDES):
        with torch.set_grad_enabled(gradients):
            flops = 4 * ((side // 16) ** 2 + TEXT) ** 2 * HEADS * HEAD_DIM * (BACKWARD if gradients else 1)
            calls_of = ("attention", "torch", attention), ("block", "diffusers", block)
            for what, over, make in calls_of:
                calls = make(side, gradients)
                what = f"{what} with gradients" if gradients else what
                seconds = in_turn(calls, args.rounds)
                times = {name: statistics.median(t) for name, t in seconds.items()}
                row: dict[str, Any] = {"seconds": {name: round(t, 5) for name, t in times.items()}}
                row["times as fast"] = {name: round(ratios(seconds, over, name), 2) for name in times if name != over}
                if over == "torch":
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
        "attention with gradients at 1024 px": found["attention with gradients, 1024 px"]["times as fast"]["ours"]
        >= ATTENTION_BAR,
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
