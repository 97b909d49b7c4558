"""Losses of the shipped tiny model on one process and on two under each layout, and of a run that changes layouts.

    python -m benchmarks.parallel_losses --out benchmarks/results/<date>-parallel-losses.json

Twenty steps of pictures and edits, float32, gloo. Only numbers are compared; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.folders import SHIPPED

STEPS = 20
LAYOUTS = {"FSDP2 x 2": ["parallel.dp_shard=2"], "TP x 2": ["parallel.tp=2"], "Ulysses x 2": ["parallel.cp=2"]}
RECIPE = {
    "device": "cpu", "batch": 4, "steps": STEPS, "optimizer": {"lr": 1e-3},
    "model": {"folder": str(SHIPPED), "train_text_encoder": False},
    "data": {"options": {"size": 64}, "buckets": [[64, 64]], "tasks": {"t2i": 1.0, "ti2i": 1.0}},
    "log": {"every": 1}, "checkpoint": {"every": 10},
}  # fmt: skip


def runs(layouts: dict[str, list[str]]) -> list[tuple[str, list[str], bool]]:
    """(name of the folder, changes, whether to resume) of everything that two processes train."""
    found = [(name, changes, False) for name, changes in layouts.items()]
    parts = STEPS // len(layouts)
    for number, changes in enumerate(layouts.values()):
        last = number == len(layouts) - 1
        steps = STEPS if last else parts * (number + 1)
        found.append(("changing", [*changes, f"steps={steps}"], number > 0))
    return found


def train_all(folder: Path, jobs: list[tuple[str, list[str], bool]]) -> None:
    from qwen_image_fast.training.run import train

    for name, changes, resume in jobs:
        train(folder / "recipe.yaml", changes, folder / name, resume=resume, allow_changes=resume)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def compare(folder: Path) -> dict[str, Any]:
    """Run everything in `folder`; the losses and by how much they differ at most."""
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    train_all(folder, [("1 process", [], False)])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, "-m", "benchmarks.parallel_losses", "--ranks", str(folder)], check=True)
    alone = losses(folder / "1 process")
    result: dict[str, Any] = {"1 process": {"losses": alone}}
    for name in [*LAYOUTS, "changing"]:
        own = losses(folder / name)
        difference = max(abs(a - b) / abs(b) for a, b in zip(own, alone, strict=True))
        result[name] = {"losses": own, "largest_relative_difference": difference}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ranks:
        train_all(options.ranks, runs(LAYOUTS))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder))
    result = {
        "case": f"{STEPS} steps of the tiny model, pictures and edits, float32, gloo; changing: a third of each layout",
        "torch": torch.__version__, "recipe": RECIPE | {"model": "the shipped tiny one, its text encoder frozen"},
        "runs": found,
    }  # fmt: skip
    atomic_write(options.out, lambda file: file.write(json_bytes(result)))
    for name, values in found.items():
        print(f"{name:12} {values.get('largest_relative_difference', 0):.1e}")


if __name__ == "__main__":
    main()
