"""Duplicates among those that every filter let pass: all are found, and of each group the best stays."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_pictures import encoded, photos
from PIL import Image, ImageFilter

from qwen_image_fast.training.data import pipeline
from qwen_image_fast.training.data.audit import ROWS
from qwen_image_fast.training.data.compare import columns, compare, read_survivors
from qwen_image_fast.training.data.filters import duplicates
from qwen_image_fast.training.data.filters.picture import Picture
from qwen_image_fast.training.data.recipe import FilterRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards

CAPTION = {"raw": "a photograph of a thing"}


def audit_of(records, folder, *stages, **quality):
    """{origin: row} of records that go through some stages."""
    write_shards([Record(image, CAPTION, origin=origin) for origin, image in records], folder / "in")
    recipe = FilterRecipe(sources=[SourceRecipe(str(folder / "in"))], stages=list(stages), without=["nsfw"])
    for name, value in quality.items():
        setattr(recipe.quality, name, value)
    pipeline.run_filters(recipe, folder / "out")
    rows = pq.read_table(folder / "out" / "audit.parquet").to_pylist()
    return {origin: row for (origin, _), row in zip(records, rows, strict=True)}


def test_the_best_of_a_group_stays_among_those_that_pass_all_else(tmp_path):
    photo = Image.fromarray(photos()["chelsea.png"])
    smaller, larger = (photo.resize((photo.width * n // 10, photo.height * n // 10)) for n in (9, 13))
    soft = photo.filter(ImageFilter.GaussianBlur(0.5))
    rows = audit_of(
        [
            ("blurred", encoded(photo.filter(ImageFilter.GaussianBlur(3)))), ("smaller", encoded(smaller)),
            ("soft", encoded(soft)), ("sharp", encoded(photo)), ("again", encoded(photo)),
            ("other", encoded(photos()["coffee.png"])),
        ],
        tmp_path, 1, 2, min_clarity=0.4,
    )  # fmt: skip
    fates = {origin: (row["filter"], row["kept"]) for origin, row in rows.items()}
    assert fates == {
        "blurred": ("clarity", False),  # before, the sharp ones went as its copies
        "smaller": ("near_duplicate", False), "soft": ("near_duplicate", False), "sharp": (None, True),
        "again": ("exact_duplicate", False), "other": (None, True),
    }  # fmt: skip
    sharp = rows["sharp"]["origin"]
    assert rows["again"]["reason"] == f"the file is the same as {sharp}" and rows["again"]["exact_duplicate"] == 1
    assert rows["soft"]["reason"].startswith(f"it looks like {sharp}: ") and rows["soft"]["near_duplicate"] <= 4
    rows = audit_of([("first", encoded(photo)), ("larger", encoded(larger))], tmp_path / "b", 1)
    assert [row["kept"] for row in rows.values()] == [False, True]  # by resolution, not by order
    rows = audit_of([("first", encoded(photo)), ("jpeg", encoded(photo, "JPEG", quality=90))], tmp_path / "c", 1)
    assert [row["kept"] for row in rows.values()] == [True, False]
    jpegs = [(f"{quality}", encoded(photo, "JPEG", quality=quality)) for quality in (80, 95)]
    rows = audit_of(jpegs, tmp_path / "d", 1)
    assert [row["kept"] for row in rows.values()] == [False, True]  # by quality: what is squeezed has fewer bytes


@pytest.mark.parametrize(
    ("without", "changes", "expected"),
    [
        ([], {}, True),
        (["near_duplicate"], {}, True),
        (["exact_duplicate"], {}, True),
        (["exact_duplicate", "near_duplicate"], {"tail": 1}, False),
        (["exact_duplicate", "near_duplicate"], {"power": 0.5}, True),
        (["exact_duplicate", "near_duplicate", "taxonomy"], {"power": 0.5}, False),
        (["exact_duplicate", "near_duplicate"], {"categories": {"Nature": 1.0}}, True),
        (["exact_duplicate", "near_duplicate", "category_balance"], {"categories": {"Nature": 1.0}}, False),
    ],
)
def test_what_compares_nothing_keeps_nothing_in_memory(tmp_path, monkeypatch, without, changes, expected):
    recipe = FilterRecipe(sources=[SourceRecipe(str(tmp_path / "in"))], without=["nsfw", *without], stages=[1, 6, 7])
    for name, value in changes.items():
        setattr(recipe.balance, name, value)
    read = []
    monkeypatch.setattr(pipeline, "read_survivors", lambda *given: read.append(given) or read_survivors(*given))
    write_shards([Record(encoded(photos()["coffee.png"]), CAPTION)] * 2, tmp_path / "in")
    result = pipeline.run_filters(recipe, tmp_path / "out")
    assert bool(read) is expected and result.kept == (2 if {"exact_duplicate", "near_duplicate"} <= {*without} else 1)


def test_photographs_are_no_copies_of_each_other(tmp_path):
    rows = audit_of([(name, encoded(picture)) for name, picture in photos().items()], tmp_path, 1)
    assert all(row["kept"] for row in rows.values())


def test_nearly_plain_pictures_are_not_taken_for_copies(tmp_path):
    """The same place of different things on a plain ground: the hash of the place alone."""
    records, hashes = [], []
    for name, pixels in photos().items():
        ground = Image.new("RGB", (600, 600), "#3080c0")
        ground.paste(Image.fromarray(pixels).resize((120, 120)), (400, 400))
        records.append((name, encoded(ground)))
        hashes.append(duplicates.perceptual_hash(Picture(Record(records[-1][1])).luma))
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) <= 4
    assert all(row["kept"] and row["near_duplicate"] is None for row in audit_of(records, tmp_path, 1).values())


def hashes_near_each_other(seed=0):
    rng = np.random.default_rng(seed)
    base = [int(v) for v in rng.integers(0, 2**63, 40, np.uint64)]
    near = [v ^ sum(1 << int(b) for b in rng.choice(64, k, False)) for v in base for k in (1, 2, 3, 6, 7, 8)]
    return np.unique(np.array(base + near, np.uint64))


@pytest.mark.parametrize("radius", [0, 3, 6, 7])
def test_all_pairs_are_found_once(radius):
    hashes = hashes_near_each_other()
    found = [pair for parts in duplicates.near_pairs(hashes, radius) for pair in zip(*(p.tolist() for p in parts))]
    values = hashes.tolist()
    expected = {
        (a, b, (values[a] ^ values[b]).bit_count())
        for a, b in itertools.combinations(range(len(values)), 2)
        if (values[a] ^ values[b]).bit_count() <= radius
    }
    assert {(*sorted(pair[:2]), pair[2]) for pair in found} == expected and len(found) == len(expected)
    assert len(expected) > 30 or radius == 0


def table_of(hashes, **columns_of):
    count = len(hashes)
    rows = {
        "id": [f"{n:064x}" for n in range(count)], "origin": [f"r{n}" for n in range(count)], "kept": [True] * count,
        "category": [""] * count, "node": [""] * count, "height": [1] * count, "width": [1] * count, "hash": hashes,
        "bytes": [1] * count, **columns_of,
    }  # fmt: skip
    return pa.table({name: pa.array(rows.get(name, [None] * count), ROWS.field(name).type) for name in ROWS.names})


@pytest.mark.parametrize("distance", [0, 2, 5, 7])
def test_who_goes_has_a_better_one_that_stays_within_the_distance(tmp_path, distance):
    """Against a search of everything, from the best to the worst."""
    rng = np.random.default_rng(1)
    hashes = rng.permutation(np.repeat(hashes_near_each_other(), 2)).tolist()
    height = rng.integers(1, 4, len(hashes))
    size = rng.integers(0, 3, len(hashes))
    table = table_of(hashes, height=height, bytes=size)
    recipe = FilterRecipe(stages=[1])
    recipe.curation.duplicate_bits = distance
    found = read_survivors([table.select(columns(recipe))], "clarity")
    fates = list(compare(found, recipe, tmp_path))
    order = sorted(range(len(hashes)), key=lambda n: (-height[n], -size[n], n))
    stay = []
    for n in order:
        near = min(((hashes[n] ^ hashes[m]).bit_count() for m in stay), default=64)
        if near > distance:
            stay.append(n)
            assert fates[n].filter is None and fates[n].near == (near if near <= min(distance + 2, 7) else None)
        else:
            # Of one hash, all go for whom the best of them goes for: not always the nearest.
            named = int(fates[n].reason.removeprefix("it looks like r").partition(":")[0])
            bits = (hashes[n] ^ hashes[named]).bit_count()
            assert named in stay and near <= bits <= distance and fates[n].near == bits
            assert fates[n].reason == f"it looks like r{named}: {bits} of 64 bits differ"
    assert 0 < len(stay) < len(hashes)


def test_the_balance_counts_no_copy(tmp_path):
    """Three of Nature, two of them copies, to as many as of People: none goes."""
    table = table_of([1, 1 << 20 | 1 << 40, 1, 7], category=["Nature", "People", "Nature", "Nature"])
    recipe = FilterRecipe(stages=[1, 6])
    recipe.balance.categories, recipe.curation.duplicate_bits = {"Nature": 2 / 3, "People": 1 / 3}, 0
    fates = list(compare(read_survivors([table.select(columns(recipe))], "clarity"), recipe, tmp_path))
    assert [fate.filter for fate in fates] == [None, None, "near_duplicate", None]
