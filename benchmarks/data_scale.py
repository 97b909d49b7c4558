"""What `data filter` does with all records at once: duplicates and balance of synthetic metadata, in time and memory.

python -m benchmarks.data_scale --records 1600000 --out results.json. No pictures: rows as the filters leave them, with
random hashes; one in ten is another's file and one in ten within 3 bits of another's picture. Seconds are of the
processor. The peak is of the process, torch and all other imports included, which are told apart.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import processor_name
from qwen_image_fast.training.data.audit import ROWS
from qwen_image_fast.training.data.compare import columns, compare, read_survivors
from qwen_image_fast.training.data.recipe import FilterRecipe

_BLOCK = 2**15


def tables(count: int, names: list[str]) -> Iterator[pa.Table]:
    rng = np.random.default_rng(0)
    ids: list[str] = []
    hashes = np.empty(count, np.uint64)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        fresh = rng.bytes(32 * size).hex()
        kind = rng.integers(0, 10, size) if start else np.full(size, 5)
        earlier = rng.integers(0, max(1, start), size)
        ids += [ids[earlier[n]] if kind[n] == 0 else fresh[64 * n : 64 * n + 64] for n in range(size)]
        flips = np.uint64(1) << rng.integers(0, 64, (3, size), np.uint64)
        new = rng.integers(0, 2**64, size, np.uint64, endpoint=False)
        new = np.where(kind == 0, hashes[earlier], np.where(kind == 1, hashes[earlier] ^ flips[0] ^ flips[1], new))
        hashes[start : start + size] = new
        node = rng.zipf(1.5, size) % 5000
        rows: dict[str, Any] = {
            "id": ids[start:], "origin": [f"web/{n:09d}.jpg" for n in range(start, start + size)],
            "category": [("Nature", "Design", "People")[n % 3] for n in node], "node": [f"node {n}" for n in node],
            "kept": rng.random(size) < 0.9, "height": rng.integers(512, 2048, size, np.int32),
            "width": rng.integers(512, 2048, size, np.int32), "bytes": rng.integers(10**4, 10**6, size),
            "hash": new, "clarity": rng.random(size),
        }  # fmt: skip
        yield pa.table({name: pa.array(rows[name], ROWS.field(name).type) for name in names})


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_600_000)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    chosen = parser.parse_args()
    recipe = FilterRecipe(stages=[1, 6, 7])
    recipe.balance.categories = {"Nature": 0.5, "Design": 0.3, "People": 0.2}
    recipe.balance.power, recipe.balance.tail = 0.5, 100
    before, start = peak_mib(), time.process_time()
    found = read_survivors(tables(chosen.records, columns(recipe)), recipe.balance.best_by)
    read = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        counts = collections.Counter(fate.filter or "kept" for fate in compare(found, recipe, Path(folder)))
    result = {
        "date": f"{datetime.date.today()}", "cpu": processor_name(), "records": chosen.records, "compared": len(found),
        "fates": dict(counts), "seconds_making_and_reading": round(read - start, 1),
        "seconds_comparing": round(time.process_time() - read, 1), "peak_mib": round(peak_mib()),
        "peak_mib_after_imports": round(before),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
