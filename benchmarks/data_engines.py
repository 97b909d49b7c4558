"""Whether `data filter` gives the same bytes in one process, in two and on Ray Data with a worker killed in the middle;
how much faster two processes are; and whether its peak memory grows with the records.

python -m benchmarks.data_engines --out results.json; --parts chooses, and parts measured before stay in the file.

equality: the planted records of `benchmarks.data_filters`; `digest` is of every file of the result, by name. The worker
that meets the record in the middle ends itself, as `kill -9` does. speed: photographs whose short side is 512 px, by
the command with `--workers` 1 and 2 in turns, and with 1 on one core, which shows whether threads of its libraries need
a second one. `seconds` are of the clock, and the load average says what else the machine did; `path`
are those of the processor, of the command's process and of one of its equal workers, which follow each other. memory:
stages 1 to 3 on pictures of 64 px, in a process of its own, with duplicates, whose hashes are in memory, and without.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.data_filters import corpus, crop, recipe_of
from benchmarks.harness import processor_name, resident_bytes
from qwen_image_fast.training.data.engine import engine_of
from qwen_image_fast.training.data.filters.base import Filter, Verdict
from qwen_image_fast.training.data.filters.curation import FileSize
from qwen_image_fast.training.data.filters.picture import Picture
from qwen_image_fast.training.data.judge import build_filters
from qwen_image_fast.training.data.judging import MakeFilters
from qwen_image_fast.training.data.pipeline import run_filters
from qwen_image_fast.training.data.recipe import FilterRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.synthesis.photos import find_photos, open_photo

_SMALL = 64
_SHORT_SIDE = 512
_KINDS = ["with duplicates", "without duplicates"]


class KillsOnce(FileSize):
    """The filter `file_size`, which ends its process at one record, the first time."""

    def __init__(self, recipe: FilterRecipe, key: str, marker: str):
        super().__init__(recipe.curation.min_bytes, recipe.curation.max_bytes)
        self.key, self.marker = key, marker

    def judge(self, picture: Picture) -> Verdict:
        if picture.record.origin.endswith(self.key) and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().judge(picture)


def filters_with_a_kill(recipe: FilterRecipe, key: str, marker: str) -> list[Filter]:
    return [KillsOnce(recipe, key, marker) if isinstance(f, FileSize) else f for f in build_filters(recipe)]


def planted(count: int, folder: Path) -> None:
    records = (dataclasses.replace(record, metadata={}) for record in corpus(count))
    write_shards(tqdm(records, "planting", count, mininterval=10), folder)


def filtered(
    source: Path, out: Path, engine: str, workers: int, filters: MakeFilters = build_filters
) -> dict[str, Any]:
    """What one run found."""
    recipe, shown = recipe_of(source), tqdm(desc=f"{engine}, {workers}", unit="record", mininterval=10)
    start = time.perf_counter()

    def progress(count: int, total: int) -> None:
        shown.total = total
        shown.update(count)

    carrier = engine_of(engine, recipe)
    try:
        result = run_filters(recipe, out, engine=carrier, workers=workers, filters=filters, progress=progress)
    finally:
        carrier.close()
        shown.close()
    seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return {
        "seconds": round(seconds, 1), "kept": result.kept, "rejected": result.rejected, "digest": digest.hexdigest(),
    }  # fmt: skip


def equality(count: int, folder: Path) -> dict[str, Any]:
    planted(count, folder / "in")
    marker = folder / "killed"
    kill = partial(filters_with_a_kill, key=f":{count // 2:09d}", marker=str(marker))
    runs = {
        "local, 1 process": filtered(folder / "in", folder / "1", "local", 1),
        "local, 2 processes": filtered(folder / "in", folder / "2", "local", 2),
        "ray, 2 actors, one killed": filtered(folder / "in", folder / "ray", "ray", 2, kill),
    }
    equal = len({one["digest"] for one in runs.values()}) == 1
    return {"records": count, "equal": equal, "worker_killed": marker.exists(), "runs": runs}


# The command, and what it says at its end: seconds of the processor of its own process, and of those it started.
_TIMED = """
import json, resource, sys
from qwen_image_fast.__main__ import main
try:
    main()
finally:
    used = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([one.ru_utime + one.ru_stime for one in used]))
"""


def photographs(count: int) -> Iterator[Record]:
    """Crops of photographs whose short side is 512 px, under a random light, as JPEG."""
    rng = np.random.default_rng(0)
    photos = [open_photo(path).convert("RGB") for path, _, _ in find_photos(None)]
    for number in tqdm(range(count), "photographs", mininterval=10):
        file = io.BytesIO()
        crop(photos[rng.integers(len(photos))], rng, _SHORT_SIDE).save(file, "JPEG", quality=90)
        yield Record(file.getvalue(), {"raw": f"a photograph, number {number} of many"}, "photo", origin=str(number))


def speed(count: int, rounds: int, folder: Path) -> dict[str, Any]:
    write_shards(photographs(count), folder / "in")
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(recipe_of(folder / "in"))))
    ways = {"1 process on one core": (1, 1), "1 process": (1, None), "2 processes": (2, None)}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            workers, cores = ways[way]
            pinned = ["taskset", "--cpu-list", "0"] if cores else []
            start = time.perf_counter()
            command = [*pinned, sys.executable, "-c", _TIMED, "data", "filter", str(recipe), "--workers", str(workers),
                       "--out", str(folder / "out")]  # fmt: skip
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            own, others = json.loads(said.splitlines()[-1])
            runs[way].append({
                "seconds": round(time.perf_counter() - start, 1), "of_its_process": round(own, 1),
                "of_its_workers": round(others, 1), "path": round(own + others / workers, 1),
                "load_average": round(os.getloadavg()[0], 1),
            })  # fmt: skip
            print(way, runs[way][-1], flush=True)
            shutil.rmtree(folder / "out")
    one, two = runs["1 process"], runs["2 processes"]
    faster = {
        name: round(statistics.median(first[name] / then[name] for first, then in zip(one, two)), 2)
        for name in ("seconds", "path")
    }
    return {"records": count, "short side": _SHORT_SIDE, "faster": faster, "runs": runs}


def small_records(count: int) -> Iterator[Record]:
    """Crops of photographs of 64 px under a random light, as JPEG."""
    rng = np.random.default_rng(0)
    photos = [np.asarray(open_photo(path).convert("RGB").reduce(2), np.float32) for path, _, _ in find_photos(None)]
    for number in tqdm(range(count), "small pictures", mininterval=10):
        photo = photos[rng.integers(len(photos))]
        top, left = (rng.integers(side - _SMALL) for side in photo.shape[:2])
        light = Image.fromarray(rng.uniform(0.4, 1.0, (4, 4)).astype(np.float32)).resize((_SMALL, _SMALL))
        pixels = photo[top : top + _SMALL, left : left + _SMALL] * np.asarray(light)[..., None]
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
        yield Record(file.getvalue(), {"raw": f"a photograph, number {number} of many"}, "small", origin=str(number))


def memory(counts: list[int], kinds: list[str], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count in counts:
        write_shards(small_records(count), folder / "in", shard_records=10_000)
        for name in kinds:
            without = ["exact_duplicate", "near_duplicate"] if name == "without duplicates" else []
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak, kept = pool.apply(_peak, (folder / "in", folder / "out", without))
            shutil.rmtree(folder / "out")
            found[f"{count} records, {name}"] = {"peak_mib": peak, "kept": kept}
            print(count, name, peak, kept, flush=True)
    return found


def _peak(source: Path, out: Path, without: list[str]) -> tuple[int, int]:
    recipe = recipe_of(source)
    recipe.stages, recipe.without = [1, 2, 3], ["nsfw", *without]
    recipe.curation.min_side = _SMALL
    with tqdm(unit="record", mininterval=10) as bar:
        result = run_filters(recipe, out, progress=lambda records, total: bar.update(records))
    return round(resident_bytes("VmHWM") / 2**20), result.kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("equality", "speed", "memory"),
                        default=["equality", "speed", "memory"])  # fmt: skip
    parser.add_argument("--records", type=int, default=20_000, help="of equality")
    parser.add_argument("--speed-records", type=int, default=3_000)
    parser.add_argument("--rounds", type=int, default=3, help="of speed")
    parser.add_argument("--memory-records", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--memory-kinds", nargs="+", choices=_KINDS, default=_KINDS)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    chosen = parser.parse_args()
    measures = {
        "equality": partial(equality, chosen.records), "speed": partial(speed, chosen.speed_records, chosen.rounds),
        "memory": partial(memory, chosen.memory_records, chosen.memory_kinds),
    }  # fmt: skip
    result: dict[str, Any] = {}
    if chosen.out and chosen.out.is_file():
        result = json.loads(chosen.out.read_text())
    result |= {"date": f"{datetime.date.today()}", "cpu": processor_name(), "cores": os.cpu_count()}
    for part in chosen.parts:
        with tempfile.TemporaryDirectory() as name:
            measured = measures[part](Path(name))
        result[part] = {**result.get(part, {}), **measured} if part == "memory" else measured
        print(json.dumps({part: result[part]}, indent=1), flush=True)
        if chosen.out:
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    if not result.get("equality", {}).get("equal", True):
        raise SystemExit("the results differ")


if __name__ == "__main__":
    main()
