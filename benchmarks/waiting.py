"""How OpenMP's threads should wait for each other: the tiny model and a larger one, on a quiet and on a busy machine.

python -m benchmarks.waiting --out results.json. Every way of waiting is a process of its own, since the runtime reads
it when it loads; the ways take turns for some rounds. Busy: as many processes that only spin as `--spinners` says, of
the same priority. The load of the machine by others is in the results; seconds are the least of all rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Names of the ways, and what the process starts with.
WAYS = {
    "as the runtime comes": {},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 100": {"GOMP_SPINCOUNT": "100"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")


def work(steps: int, repeats: int) -> dict[str, float]:
    """Least seconds: a step of the tiny model at 128 x 128, its decoding, and one pass of two blocks of width 768."""
    import torch

    from qwen_image_fast import QwenImagePipeline, QwenImageTransformer2DModel

    pipe = QwenImagePipeline.from_pretrained("tiny", torch_dtype=torch.float32)
    torch.manual_seed(7)
    sizes = {"attention_head_dim": 128, "num_attention_heads": 6, "joint_attention_dim": 512}
    model = QwenImageTransformer2DModel(num_layers=2, **sizes).eval()
    img, txt = torch.randn(1, 1024, 64), torch.randn(1, 32, 512)
    seconds: dict[str, float] = {}
    for _ in range(repeats + 1):  # once more, for warming up
        size = {"height": 128, "width": 128, "num_inference_steps": steps}
        pipe("a red circle", seed=1, progress=False, true_cfg_scale=1.0, **size)
        start = time.perf_counter()
        with torch.inference_mode():
            model(img, txt, timestep=torch.tensor([0.5]), img_shapes=[[(1, 32, 32)]])
        found = {"step": pipe.times["denoise"] / steps, "decode": pipe.times["decode"]}
        found["blocks"] = time.perf_counter() - start
        seconds = {name: min(value, seconds.get(name, value)) for name, value in found.items()}
    return seconds


def timed(way: str, steps: int, repeats: int) -> dict[str, float]:
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-m", "benchmarks.waiting", "--work", "--steps", str(steps)]
    command += ["--repeats", str(repeats)]
    done = subprocess.run(command, env=env | WAYS[way], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def busy_share(seconds: float = 0.5) -> float:
    """Share of all processors' time that somebody takes."""

    def ticks() -> tuple[int, int]:
        values = list(map(int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]))
        return sum(values), values[3] + values[4]

    (whole, idle), _ = ticks(), time.sleep(seconds)
    later, later_idle = ticks()
    return 1 - (later_idle - idle) / max(1, later - whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--spinners", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.steps, options.repeats)))
        return
    from benchmarks.harness import processor_name

    found: dict[str, dict[str, dict[str, float]]] = {}
    before: dict[str, list[float]] = {}
    for load, count in (("quiet", 0), ("busy", options.spinners)):
        before[load] = []
        spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            for _ in range(options.rounds if not count else 1):
                for way in WAYS:
                    sizes = (options.steps, options.repeats) if not count else (2, 1)
                    before[load].append(round(busy_share(), 2))
                    one, least = timed(way, *sizes), found.setdefault(load, {})
                    kept = least.get(way, one)
                    least[way] = {name: round(min(value, kept[name]), 5) for name, value in one.items()}
                    print(load, way, least[way], flush=True)
        finally:
            for spinner in spinners:
                spinner.kill()
                spinner.wait()
    report = {
        "date": datetime.date.today().isoformat(), "processor": processor_name(), "processors": os.cpu_count(),
        "spinners when busy": options.spinners, "share of the machine in use before each run": before,
        "seconds": found,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
