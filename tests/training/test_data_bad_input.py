"""Everything that can be wrong with a source at once: the run goes on, and each record's fate is in the audit."""

import sqlite3
import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_pictures import encoded, photos
from PIL import Image

from qwen_image_fast.training.data import pipeline
from qwen_image_fast.training.data.recipe import FilterRecipe, SourceRecipe


def bomb():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    content = bytearray(encoded(Image.new("L", (1, 1))))
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def text_bomb():
    """A PNG whose compressed text chunk is 80 MB when unpacked."""
    body = b"zTXt" + b"Comment\0\0" + zlib.compress(b" " * 80_000_000, 9)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    whole = encoded(Image.new("RGB", (300, 300)))
    return whole[:33] + chunk + whole[33:]


def sources():
    """{name: (bytes, caption, what the audit says; None: it is kept)}."""
    cat = Image.fromarray(photos()["chelsea.png"])
    deep = np.asarray(Image.fromarray(photos()["coffee.png"]).convert("L")).astype(np.uint16) << 8
    frames = [Image.fromarray(photos()["rocket.jpg"]).resize((300, 300)).rotate(n) for n in (0, 9)]
    good, whole = "a photograph of a thing", encoded(photos()["astronaut.png"])
    return {
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), good, "it is animated"),
        "bomb.png": (bomb(), good, "(3600000000 pixels) exceeds limit"),
        "cmyk.jpg": (encoded(cat.convert("CMYK"), "JPEG", quality=95), good, None),
        "control.png": (encoded(photos()["grass.png"]), "a lawn\x00\x1b[2J of grass", "has control characters"),
        "corrupt.png": (whole[:5000] + b"\xff" * 500 + whole[5500:], good, "it cannot be decoded"),
        "deep.png": (encoded(deep), good, None),
        "empty.png": (b"", good, "the file is empty"),
        "long.png": (encoded(photos()["gravel.png"]), "words of a caption " * 6000, "the caption is too long"),
        "page.png": (b"<html>404 not found</html>" * 200, good, "it cannot be decoded"),
        "text.png": (text_bomb(), good, "it cannot be decoded"),
        "truncated.png": (whole[: len(whole) // 2], good, "it cannot be decoded"),
        "wrong.jpg": (encoded(photos()["camera.png"]), good, None),  # a PNG: what counts are the bytes
    }


def recipe_of(folder):
    return FilterRecipe(sources=[SourceRecipe(str(folder))], stages=[1, 2, 3], without=["nsfw"])


def test_each_fate_is_in_the_audit(tmp_path):
    expected = sources()
    (tmp_path / "in").mkdir()
    for name, (content, caption, _) in expected.items():
        (tmp_path / "in" / name).write_bytes(content)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(caption)
    result = pipeline.run_filters(recipe_of(tmp_path / "in"), tmp_path / "out")
    rows = {row["origin"]: row for row in pq.read_table(tmp_path / "out" / "audit.parquet").to_pylist()}
    assert rows.keys() == expected.keys() and result.kept == sum(why is None for _, _, why in expected.values())
    for name, (_, _, why) in expected.items():
        assert (rows[name]["reason"] is None) if why is None else (why in rows[name]["reason"]), (name, rows[name])


@pytest.mark.parametrize("place", ["tables", "shards"])
def test_a_full_disk_is_a_sentence_and_the_run_can_be_repeated(tmp_path, monkeypatch, place):
    (tmp_path / "in").mkdir()
    for name in ("astronaut.png", "chelsea.png", "coffee.png"):
        (tmp_path / "in" / name).write_bytes(encoded(photos()[name]))
        (tmp_path / "in" / name).with_suffix(".txt").write_text("a photograph of a thing")
    recipe = recipe_of(tmp_path / "in")
    recipe.stages, recipe.balance.power = [1, 2, 3, 7], 0.5
    with monkeypatch.context() as patch:
        if place == "tables":
            opened = sqlite3.connect

            def small(*args, **options):
                database = opened(*args, **options)
                database.execute("PRAGMA max_page_count = 1")  # SQLite then says what it says of a full disk
                return database

            patch.setattr("sqlite3.connect", small)
        else:

            def full(file):
                raise OSError(28, "No space left on device")

            patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="the disk is full: .* free space and"):
            pipeline.run_filters(recipe, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".filtering"]
    assert pipeline.run_filters(recipe, tmp_path / "out").kept == 3
