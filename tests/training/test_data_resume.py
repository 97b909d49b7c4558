"""Runs that are killed and go on, in one process and in several; records that end whatever judges them."""

import json
import multiprocessing
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_killers import Killer, filters_that_kill, run_and_die
from data_pictures import encoded, noise, photos
from threadpoolctl import threadpool_info, threadpool_limits

from qwen_image_fast.training.data import judging, parts, pipeline
from qwen_image_fast.training.data.collect import collect
from qwen_image_fast.training.data.journal import Journal
from qwen_image_fast.training.data.judge import build_filters
from qwen_image_fast.training.data.recipe import FilterRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards


def pictures(folder, count=10):
    """Crops of a photograph that pass, one that is twice there, one that is no picture."""
    folder.mkdir()
    coffee = photos()["coffee.png"]
    for number in range(count):
        crop = coffee[number * 15 : number * 15 + 40, number * 20 : number * 20 + 40]
        (folder / f"{number}.png").write_bytes(encoded(crop if number != 3 else coffee[:40, :40]))
    (folder / "page.png").write_bytes(b"<html>")
    return folder


def recipe_of(folder, **fields):
    recipe = FilterRecipe(sources=[SourceRecipe(str(folder), **fields)], stages=[1])
    recipe.curation.min_side, recipe.curation.min_bytes, recipe.without = 16, 1, ["nsfw"]
    return recipe


def written(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_killed_in_the_middle_it_goes_on_and_judges_nothing_twice(tmp_path, monkeypatch):
    recipe = recipe_of(pictures(tmp_path / "in"), licence="7.png")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_and_die, args=(recipe, tmp_path / "killed", 2))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [".filtering"]
    monkeypatch.setattr(parts, "RECORDS", 2)
    seen, before = [], judging.PartJudge._judged

    def judged(self, record):
        seen.append(record.origin)
        return before(self, record)

    monkeypatch.setattr(judging.PartJudge, "_judged", judged)
    counts = []
    pipeline.run_filters(recipe, tmp_path / "killed", progress=lambda count, total: counts.append((count, total)))
    assert seen == ["6.png", "7.png", "8.png", "9.png", "page.png"] and counts[0] == (6, 11) and counts[-1] == (1, 11)
    pipeline.run_filters(recipe, tmp_path / "whole")
    assert written(tmp_path / "killed") == written(tmp_path / "whole")
    reasons = pq.read_table(tmp_path / "whole" / "audit.parquet").column("reason").to_pylist()
    assert reasons[-1] == "it cannot be decoded: cannot identify image file"  # and no address of an object


def test_what_judges_lets_no_threads_spin(tmp_path):
    """Those of numpy's BLAS took a second processor and did nothing with it."""
    with threadpool_limits(2, "blas"):
        judging.PartJudge(recipe_of(pictures(tmp_path / "in")), Journal(tmp_path / "out"), build_filters)
        assert all(pool["num_threads"] == 1 for pool in threadpool_info() if pool["user_api"] == "blas")


def test_processes_give_the_same_bytes_and_a_poison_record_is_left_out(tmp_path, monkeypatch):
    """Of two parts, one has a record that ends its process; all others are judged as ever."""
    monkeypatch.setattr(parts, "RECORDS", 6)
    recipe = recipe_of(pictures(tmp_path / "in"), licence="7.png")
    pipeline.run_filters(recipe, tmp_path / "many", workers=2, filters=filters_that_kill)
    monkeypatch.setattr(Killer, "judge", lambda self, picture: pytest.fail("unused"))
    pipeline.run_filters(recipe, tmp_path / "one", filters=build_filters)
    many, one = (pq.read_table(tmp_path / name / "audit.parquet").to_pylist() for name in ("many", "one"))
    (poison,) = [row for row in many if row["origin"] == "7.png"]
    assert (poison["filter"], poison["kept"]) == ("broken_file", False) and "ended, three times" in poison["reason"]
    assert poison["id"] == next(row["id"] for row in one if row["origin"] == "7.png")
    others = [[row | {"file_size": 0} for row in rows if row["origin"] != "7.png"] for rows in (many, one)]
    assert others[0] == others[1] and len(others[0]) == 10


def test_a_filter_that_fails_rejects_the_record_and_stops_a_run_in_which_it_always_does(tmp_path):
    class Failing(Killer):
        def judge(self, picture):
            if picture.record.origin in self.origin:
                raise ValueError(f"no <{type(self).__module__}.X object at 0x7f00aa> here")
            return super().judge(picture)

    recipe = recipe_of(pictures(tmp_path / "in", 24))
    pipeline.run_filters(recipe, tmp_path / "out", filters=lambda recipe: [Failing({"2.png"}), *build_filters(recipe)])
    (row,) = [r for r in pq.read_table(tmp_path / "out" / "audit.parquet").to_pylist() if r["origin"] == "2.png"]
    assert (row["filter"], row["reason"]) == ("file_size", "file_size failed on it: no here")
    every = {f"{number}.png" for number in range(24)}
    with pytest.raises(RuntimeError, match="file_size failed on 20 records in a row, at last on .*add it to the"):
        pipeline.run_filters(recipe, tmp_path / "bad", filters=lambda recipe: [Failing(every)])


def test_what_changed_in_between_is_said(tmp_path, monkeypatch):
    recipe = recipe_of(pictures(tmp_path / "in"))

    def change(*args):
        (tmp_path / "in" / "5.png").write_bytes(noise(5))
        return before(*args)

    before = pipeline._write
    monkeypatch.setattr(pipeline, "_write", change)
    with pytest.raises(ValueError, match="5.png of in is not what it was when it was judged: leave the sources alone"):
        pipeline.run_filters(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "audit.parquet").exists()
    recipe.quality.min_luma = 0.5
    with pytest.raises(ValueError, match="begun with another recipe .quality.min_luma: 0.06 -> 0.5.: give the same"):
        pipeline.run_filters(recipe, tmp_path / "out")


def test_parts_hold_the_records_that_collecting_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "RECORDS", 3)
    monkeypatch.setattr(parts, "_CSV_ROWS", 3)
    monkeypatch.setattr(parts, "_PARQUET_ROWS", 3)
    records = [Record(noise(n), {"raw": f"caption {n}"}, origin=f"{n}") for n in range(8)]
    write_shards(records, tmp_path / "tar")
    write_shards(records, tmp_path / "cut")
    (tmp_path / "cut" / "index.parquet").unlink()
    shard = tmp_path / "cut" / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:30_000])
    pictures(tmp_path / "folder", 7)
    (tmp_path / "folder" / "deep").mkdir()
    (tmp_path / "folder" / "deep" / "a.png").write_bytes(noise(1))
    (tmp_path / "table").mkdir()
    rows = [{"image": f"../folder/{n}.png", "caption": f"caption {n}"} for n in range(7)]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "table" / "a.jsonl").write_text(lines.replace("}", "}\n{broken", 1) + "\n")
    (tmp_path / "table" / "b.csv").write_text("image,caption\n" + "".join(f"{n}.png,c{n}\n" for n in range(4)))
    pq.write_table(pipeline_table(rows), tmp_path / "table" / "c.parquet", row_group_size=2)
    (tmp_path / "table" / "d.parquet").write_bytes(b"no parquet")
    (tmp_path / "table" / "e.csv").write_bytes(b"image\n\xff\xfe\x00")
    for name, least in (("tar", 3), ("cut", 2), ("folder", 3), ("table", 8)):
        source = SourceRecipe(str(tmp_path / name))
        planned = list(parts.plan([source]))
        parts.write_plan(planned, tmp_path / "plan.jsonl")
        assert list(parts.read_plan(tmp_path / "plan.jsonl")) == planned and len(planned) >= least
        found = [list(parts.read_part(part, source)) for part in planned]
        assert [len(some) for some in found] == [part.count for part in planned], name
        assert [one for some in found for one in some] == list(collect(source.path)), name
    with pytest.raises(FileNotFoundError, match="there is no"):
        list(parts.plan([SourceRecipe(str(tmp_path / "nowhere"))]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no pictures"):
        list(parts.plan([SourceRecipe(str(tmp_path / "empty"))]))


def pipeline_table(rows):
    import pyarrow as pa

    return pa.Table.from_pylist(rows)


def test_a_result_appears_whole(tmp_path):
    recipe = recipe_of(pictures(tmp_path / "in"))
    there = []

    def beside(folder):
        there.append(sorted(path.name for path in (tmp_path / "out").iterdir()))
        (folder / "more.txt").write_text("more")

    result = pipeline.run_filters(recipe, tmp_path / "out", beside=beside)
    assert there == [[".filtering"]] and (result.seen, result.kept) == (11, 9)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.parquet", "more.txt", "shards"]
    assert np.all(pq.read_table(tmp_path / "out" / "shards" / "index.parquet").column("bytes").to_numpy() > 0)
