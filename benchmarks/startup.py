"""Processor seconds of the first moments: help, wrong arguments, imports.

python -m benchmarks.startup --out results.json. Seconds of user and system time of the whole process, the least of some
runs; what `import qwen_image_fast` adds is beside `import torch`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

COMMAND = ["-m", "qwen_image_fast"]
CASES = {
    "python alone": ["-c", ""],
    "--help": [*COMMAND, "--help"],
    "--version": [*COMMAND, "--version"],
    "generate --help": [*COMMAND, "generate", "--help"],
    "train --help": [*COMMAND, "train", "--help"],
    "an unknown command": [*COMMAND, "frobnicate"],
    "an unknown option": [*COMMAND, "generate", "a cat", "--frobnicate"],
    "a bad number": [*COMMAND, "generate", "a cat", "--steps", "two"],
    "a bad size": [*COMMAND, "generate", "a cat", "--size", "100x64"],
    "a bad type": [*COMMAND, "edit", "a cat", "--dtype", "int8"],
    "a missing folder": [*COMMAND, "generate", "a cat", "--output", "none/x.png"],
    "a missing model": [*COMMAND, "generate", "a cat", "--model", "no/such/model"],
    "a missing recipe": [*COMMAND, "train", "none"],
    "import torch": ["-c", "import torch"],
    "import torch, qwen_image_fast": ["-c", "import torch, qwen_image_fast"],
    "import QwenImagePipeline": ["-c", "from qwen_image_fast import QwenImagePipeline"],
}
BARS = {"--help": 0.35, "an ": 0.5, "a ": 0.5}


def seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], capture_output=True, env=env, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    from benchmarks.harness import processor_name

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    found: dict[str, float] = {}
    for _ in range(options.rounds):  # in turn
        for name, arguments in CASES.items():
            found[name] = round(min(seconds(arguments), found.get(name, 1e9)), 3)
    for name, least in found.items():
        print(f"{least:6.2f} s  {name}")
    added = round(found["import torch, qwen_image_fast"] - found["import torch"], 3)
    held = all(found[n] <= bar for n in found for start, bar in BARS.items() if n.startswith(start)) and added <= 0.3
    report = {
        "date": datetime.date.today().isoformat(), "processor": processor_name(), "python": sys.version.split()[0],
        "processor seconds": found, "added to import torch": added, "bars held": held,
    }  # fmt: skip
    print(f"import qwen_image_fast adds {added} s to import torch; bars held: {held}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
