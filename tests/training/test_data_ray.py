"""The run on Ray Data: the bytes of the local run, with a worker killed in the middle."""

import os
import re
import signal
import sys

import numpy as np
import pytest
from data_pictures import encoded, photos
from test_data_compare import hashes_near_each_other

from qwen_image_fast.training.data import parts, pipeline
from qwen_image_fast.training.data.compare import local_groups
from qwen_image_fast.training.data.engine import engine_of
from qwen_image_fast.training.data.filters.base import Filter, Verdict
from qwen_image_fast.training.data.filters.duplicates import best_of, near_pairs
from qwen_image_fast.training.data.judge import build_filters
from qwen_image_fast.training.data.recipe import FilterRecipe, RayRecipe, SourceRecipe

ray = pytest.importorskip("ray")
pytest.importorskip("pandas", reason="Ray Data needs pandas: the extra ray brings it")


@pytest.fixture(scope="module")
def engine():
    os.environ.pop("RAY_ADDRESS", None)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # `KillsOnce`, which the actors cannot import
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    made = engine_of("ray", FilterRecipe(ray=RayRecipe(cpus=0.5)))
    yield made
    made.close()
    assert ray.is_initialized()  # whoever started it ends it
    ray.shutdown()


class KillsOnce(Filter):
    """Ends its process at one record, the first time."""

    name, stage = "file_size", 1

    def __init__(self, marker):
        self.marker = marker

    def judge(self, picture):
        if picture.record.origin == "4.png" and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return Verdict(1.0)


def test_a_killed_worker_changes_nothing(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(parts, "RECORDS", 3)
    coffee = photos()["coffee.png"]
    (tmp_path / "in").mkdir()
    for number in range(8):
        place = 0 if number in (2, 6) else number * 20
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(coffee[place : place + 40, place : place + 40]))
    (tmp_path / "in" / "page.png").write_bytes(b"<html>")
    recipe = FilterRecipe(sources=[SourceRecipe(str(tmp_path / "in"), category="Nature")], stages=[1, 7])
    recipe.curation.min_side, recipe.curation.min_bytes, recipe.without = 16, 1, ["nsfw"]
    recipe.balance.tail, recipe.balance.power = 3, 0.5
    marker = str(tmp_path / "killed")

    def filters(recipe):
        return [KillsOnce(marker), *build_filters(recipe)]

    counts = []
    result = pipeline.run_filters(
        recipe, tmp_path / "ray", engine=engine, filters=filters, workers=2,
        progress=lambda count, total: counts.append((count, total)),
    )  # fmt: skip
    assert os.path.exists(marker) and sum(count for count, _ in counts) == 9 and result.rejected["exact_duplicate"] == 2
    pipeline.run_filters(recipe, tmp_path / "local", filters=filters)
    files = {
        name: {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in ("ray", "local")
    }
    assert files["ray"] == files["local"] and len(files["ray"]) == 3
    rows = engine.timeline.rows()
    assert [row["name"] for row in rows][-2:] == ["exact duplicates", "near duplicates"]
    workers = [row for row in rows if re.fullmatch(r"worker \d+, machine 1", row["name"])]
    assert len(workers) == len(rows) - 2 and sum(span[2] for row in workers for span in row["spans"]) == 9
    ends = [end for row in workers for start, end, _ in row["spans"] if 0 <= start <= end]
    assert len(ends) == sum(len(row["spans"]) for row in workers)
    assert rows[-2]["spans"][0][0] >= max(ends) and rows[-1]["spans"][0][0] >= rows[-2]["spans"][-1][1]


def test_the_exchanges_find_what_one_machine_finds(engine):
    rng = np.random.default_rng(0)
    keys = np.array([b"\0" + rng.bytes(30) + b"k" for _ in range(60)], "S32")[rng.integers(0, 60, 200)]
    rank = rng.permutation(200)
    assert np.array_equal(best_of(engine.groups(keys), rank), best_of(local_groups(keys), rank))
    hashes = hashes_near_each_other()

    def pairs(found):
        return sorted((*sorted(p[:2]), p[2]) for part in found for p in zip(*(a.tolist() for a in part), strict=True))

    assert pairs(engine.pairs(hashes, 6)) == pairs(near_pairs(hashes, 6)) != []
