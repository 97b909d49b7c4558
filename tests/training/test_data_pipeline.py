"""From sources to shards and an audit: what passes, what goes and why, twice the same, in constant memory."""

import collections
import dataclasses
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_pictures import encoded, noise, photo_record, photos
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.data import pipeline
from qwen_image_fast.training.data.caption_sets import in_set
from qwen_image_fast.training.data.collect import collect
from qwen_image_fast.training.data.filters.balance import Balance
from qwen_image_fast.training.data.filters.order import FILTER_NAMES, FILTERS
from qwen_image_fast.training.data.recipe import FilterRecipe, SourceRecipe, read_filter_recipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.recipe.fields import RecipeError


def corpus(folder):
    """Nine photographs, and a picture each that is blurred, dark, repeated, re-encoded, truncated, badly captioned."""
    records = [photo_record(name, category="Nature") for name in sorted(photos())]
    cat = Image.fromarray(photos()["chelsea.png"])
    planted = {
        "blurred": encoded(cat.transpose(0).filter(ImageFilter.GaussianBlur(4))),
        "dark": encoded(cat.rotate(180).point(lambda v: v // 20)),
        "repeated": records[0].image,
        "re-encoded": encoded(photos()["coffee.png"], "JPEG", quality=70),
        "truncated": records[1].image[:9000],
    }
    records += [Record(image, {"raw": f"a picture that is {what}"}, origin=what) for what, image in planted.items()]
    records.append(Record(encoded(cat.crop((0, 0, 300, 300))), {"raw": "I'm sorry, I can't describe it"}))
    write_shards(records, folder)
    return [record.id for record in records]


EXPECTED = ["clarity", "luma", "exact_duplicate", "near_duplicate", "broken_file", "invalid_caption"]


def recipe_of(source, **fields):
    return FilterRecipe(sources=[SourceRecipe(str(source))], stages=[1, 2, 3, 6, 7], without=["nsfw"], **fields)


def test_every_record_has_its_fate_in_the_audit(tmp_path):
    ids = corpus(tmp_path / "in")
    seen, gone = [], {}
    result = pipeline.run_filters(
        recipe_of(tmp_path / "in"),
        tmp_path / "out",
        progress=lambda count, total: seen.append((count, total)),
        judged=lambda record, row: row["kept"] or gone.setdefault(record.id, row["reason"]),
    )
    audit = pq.read_table(tmp_path / "out" / "audit.parquet").to_pylist()
    assert [row["id"] for row in audit] == ids and seen == [(0, len(ids)), *[(1, len(ids))] * len(ids)]
    assert [row["filter"] for row in audit] == [None] * 9 + EXPECTED
    assert [row["stage"] for row in audit[9:]] == [2, 2, 1, 1, 1, 3]
    assert all(row["kept"] == (row["reason"] is None) for row in audit)
    assert {row["reason"] for row in audit if row["reason"]} >= set(gone.values()) and len(gone) == 6
    first, blurred = audit[0], audit[9]
    assert (first["height"], first["width"], first["luma"] > 0, first["nsfw"]) == (512, 512, True, None)
    assert blurred["clarity"] < 0.4 and blurred["luma"] is None  # nothing is measured after the first reason
    assert (result.seen, result.kept) == (15, 9)
    assert list(result.rejected) == [name for name in FILTER_NAMES if name in EXPECTED]
    kept = list(collect(tmp_path / "out" / "shards"))
    assert [r.id for r in kept] == ids[:9] and kept[0].caption == "a photograph of something in a place"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["audit.parquet", "shards"]


def test_twice_the_same_bytes(tmp_path):
    corpus(tmp_path / "in")
    recipe = recipe_of(tmp_path / "in")
    recipe.balance.power, recipe.balance.tail = 0.5, 4
    for name in ("a", "b", "b"):
        pipeline.run_filters(recipe, tmp_path / name)
    files = [sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in "ab"]
    assert [p.name for p in files[0]] == ["audit.parquet", "index.parquet", "shard-00000.tar"]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_captions_are_split_into_sets_before_they_are_judged(tmp_path):
    both = {"raw": "<p>a picture of a lake</p>", "recaption": "a picture of a quiet lake"}
    records = [Record(noise(n), both if n % 4 else {"raw": f"number {n} of all pictures"}) for n in range(80)]
    write_shards(records, tmp_path / "in")
    recipe = recipe_of(tmp_path / "in")
    recipe.without += ["near_duplicate", "resolution", "file_size", *(f.name for f in FILTERS if f.stage == 2)]
    recipe.captions.sets = {"raw": 1.0, "recaption": 2.0, "fused": 1.0}
    result = pipeline.run_filters(recipe, tmp_path / "out")
    kept = {record.id: record for record in collect(tmp_path / "out" / "shards")}
    for number, record in enumerate(records):
        if number % 4 == 0:
            assert kept[record.id].metadata["caption_set"] == "raw"
    drawn = collections.Counter(r.metadata["caption_set"] for r in kept.values() if "recaption" in r.captions)
    # The markup of the raw and fused sets go, and nothing of the recaptions, of which there are half.
    assert set(drawn) == {"recaption"} and 20 <= drawn["recaption"] <= 40
    assert result.rejected == {"invalid_caption": 60 - drawn["recaption"]}
    assert {r.caption for r in kept.values() if "recaption" in r.captions} == {both["recaption"]}
    assert result.unmeasured == ("alignment", "face_mosaic")


def test_a_fused_caption_is_both():
    record = Record(b"x", {"raw": "Lake Como ", "recaption": "a lake at dusk"})
    fused = in_set(record, {"fused": 1.0})
    assert fused.caption == "Lake Como a lake at dusk" and fused.metadata == {"caption_set": "fused"}
    assert in_set(dataclasses.replace(record, captions={"raw": "x", "fused": "own"}), {"fused": 1.0}).caption == "own"
    assert in_set(record, {"raw": 1.0}).caption == "Lake Como "
    for unsplit in (Record(b"x", {"raw": " "}), dataclasses.replace(record, category="Synthetic")):
        assert in_set(unsplit, {"raw": 1.0}) is unsplit


def test_a_run_that_keeps_nothing(tmp_path):
    write_shards([Record(b"no picture")], tmp_path / "in")
    assert pipeline.run_filters(recipe_of(tmp_path / "in"), tmp_path / "out").kept == 0
    assert pq.read_table(tmp_path / "out" / "shards" / "index.parquet").num_rows == 0


def balanced(tmp_path, counts, shares, tail=1000, power=1.0):
    """Reasons by (category, node) for counts of records by those."""
    table, made = Balance(tmp_path, shares, tail, power, seed=0), []
    for (category, node), count in counts.items():
        for number in range(count):
            made.append((category, node, number))
    table.add((n, f"{made[n]}", "", *made[n][:2], float(made[n][2])) for n in range(len(made)))
    gone = {number: reason for number, *reason in table.reasons(True, True)}
    kept = collections.defaultdict(list)
    for n, (category, node, number) in enumerate(made):
        if n not in gone:
            kept[category, node].append(number)
    return kept, {tuple(reason) for reason in gone.values()}


def test_categories_reach_their_shares(tmp_path):
    counts = {("Nature", "a"): 4000, ("People", "b"): 500, ("Design", "c"): 30}
    kept, reasons = balanced(tmp_path, counts, {"Nature": 0.5, "People": 0.5, "Synthetic": 0.1})
    assert len(kept["People", "b"]) == 500 and 440 < len(kept["Nature", "a"]) < 560
    assert len(kept["Design", "c"]) == 30  # has no share: stays
    assert reasons == {("category_balance", "Nature is above its share: 0.125 of its records are kept")}


def test_the_tail_of_the_taxonomy_is_whole_and_the_crowd_keeps_its_best(tmp_path):
    kept, reasons = balanced(tmp_path, {("Nature", "cat"): 400, ("Nature", "axolotl"): 90}, {}, tail=100, power=0.5)
    assert len(kept["Nature", "axolotl"]) == 90
    assert kept["Nature", "cat"] == list(range(200, 400))
    assert ("taxonomy", "cat has 400 records and keeps its best 200; this is 201") in reasons


def test_memory_does_not_grow(tmp_path):
    rng = np.random.default_rng(0)

    def peak(count):
        images = (encoded(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(count))
        records = (Record(image, {"raw": "some noise here"}) for image in images)
        write_shards(records, tmp_path / f"{count}")
        recipe = recipe_of(tmp_path / f"{count}")
        recipe.curation.min_side, recipe.quality.max_texture = 16, 1e9
        tracemalloc.start()
        result = pipeline.run_filters(recipe, tmp_path / f"{count}-out")
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result.kept == count
        return memory

    peak(5)  # imports
    assert peak(200) < peak(50) + 2**20


def test_recipes_are_checked(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("sources: [{path: photos, category: Nature}]\nquality: {min_luma: 0.1}\n")
    recipe = read_filter_recipe(file, ["stages=[1, 2]", "without=[nsfw]"])
    assert (recipe.sources[0].category, recipe.quality.min_luma, recipe.stages) == ("Nature", 0.1, [1, 2])
    for change, sentence in [
        ("quality.min_lumma=1", "no field quality.min_lumma; did you mean quality.min_luma"),
        ("sources=[]", "sources must name at least one path"),
        ("sources=[{path: a, category: Cats}]", "category must be of Nature"),
        ("stages=[2]", "stages must have 1"),
        ("stages=[1, 8]", "stages must be of 1 to 7"),
        ("without=[blur]", "without must be of broken_file"),
        ("without=[broken_file]", "leave broken_file in"),
        ("curation.duplicate_bits=9", "must be 0 to 7"),
        ("balance.categories={Nature: 0}", "shares above 0"),
        ("balance.power=2", "must be in"),
        ("quality.min_luma=dark", "quality.min_luma must be float"),
    ]:
        with pytest.raises(RecipeError, match=sentence):
            read_filter_recipe(file, [change])


def test_the_command_writes_a_sheet_of_what_was_rejected(tmp_path):
    corpus(tmp_path / "in")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{path: {tmp_path / 'in'}}}]\nwithout: [nsfw]\nstages: [1, 2, 3]\n")
    result = CliRunner().invoke(
        app, ["data", "filter", str(recipe), "--out", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0 and "9 of 15 kept" in result.output and "1 rejected by clarity" in result.output
    with Image.open(tmp_path / "out" / "rejected.png") as sheet:
        assert sheet.width == 6 * 188 + 12 and len(np.unique(np.asarray(sheet))) > 50
    assert CliRunner().invoke(app, ["data", "filter", str(recipe), "nonsense.field=1"]).exit_code == 2
