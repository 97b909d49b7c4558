"""Every kind of source gives the same records; what is damaged becomes a fault of its record."""

import base64
import io
import json
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_pictures import noise

from qwen_image_fast.training.data.collect import collect
from qwen_image_fast.training.data.record import Record, record_of
from qwen_image_fast.training.data.shards import write_shards


def folder_of(path, count=3):
    path.mkdir(parents=True)
    for number in range(count):
        (path / f"{number}.png").write_bytes(noise(number))
        (path / f"{number}.txt").write_text(f"picture {number}\n", encoding="utf-8")
    return path


def test_folder_with_captions_and_json(tmp_path):
    root = folder_of(tmp_path / "root")
    (root / "deep").mkdir()
    (root / "deep" / "a.jpg").write_bytes(noise(9))
    (root / "deep" / "a.json").write_text(
        json.dumps({"captions": {"recaption": "一只猫"}, "license": "CC0", "category": "Nature", "node": "cat", "n": 3})
    )
    records = list(collect(root, licence="mine", category="Design"))
    assert [r.origin for r in records] == ["0.png", "1.png", "2.png", "deep/a.jpg"]
    assert records[0] == Record(noise(0), {"raw": "picture 0"}, "root", "mine", "Design", {}, "0.png")
    last = records[3]
    assert (last.caption, last.licence, last.category, last.metadata) == (
        "一只猫",
        "CC0",
        "Nature",
        {"node": "cat", "n": 3},
    )
    assert len(last.id) == 64 and last.id != records[0].id


def test_shards_round_trip(tmp_path):
    records = [
        Record(noise(n), {"raw": f"caption {n}", "fused": f"猫 {n}"}, "here", "CC0", "People", {"node": "a/b"}, f"o{n}")
        for n in range(5)
    ]
    out = tmp_path / "out"
    assert write_shards(records, out, shard_records=2) == 5
    assert sorted(p.name for p in out.iterdir()) == ["index.parquet"] + [f"shard-{n:05d}.tar" for n in range(3)]
    back = list(collect(out))
    assert [(r.image, r.captions, r.category, r.metadata, r.id) for r in back] == [
        (r.image, r.captions, r.category, r.metadata, r.id) for r in records
    ]
    index = pq.read_table(out / "index.parquet").to_pylist()
    assert [(row["id"], row["shard"], row["caption"]) for row in index] == [
        (r.id, f"shard-{n // 2:05d}.tar", f"猫 {n}") for n, r in enumerate(records)
    ]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    write_shards(records, out, shard_records=2)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_webdataset_reads_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write_shards([Record(noise(n), {"raw": f"caption {n}"}) for n in range(3)], tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False))
    assert [s["txt"] for s in samples] == [b"caption 0", b"caption 1", b"caption 2"]
    assert samples[1]["png"] == noise(1)


def test_no_index_when_the_records_fail(tmp_path):
    def failing():
        yield Record(noise(0))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shards(failing(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tables_of_paths_and_bytes(tmp_path):
    folder_of(tmp_path / "images")
    rows = [
        {"image": "images/0.png", "caption": "zero"},
        {"image_base64": base64.b64encode(noise(1)).decode(), "caption": "one"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [(r.image, r.caption) for r in collect(tmp_path / "a.jsonl")] == [(noise(0), "zero"), (noise(1), "one")]

    table = pa.table(
        {"image": [{"bytes": noise(n), "path": None} for n in range(20)], "caption": list("abcdefghijklmnopqrst")}
    )
    pq.write_table(table, tmp_path / "b.parquet")
    records = list(collect(tmp_path / "b.parquet"))
    assert [r.image for r in records] == [noise(n) for n in range(20)] and records[19].caption == "t"
    pq.write_table(pa.table({"picture": ["images/2.png"], "source": ["web"]}), tmp_path / "c.parquet")
    (record,) = collect(tmp_path / "c.parquet", image_column="picture")
    assert (record.image, record.source) == (noise(2), "web")


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        list(collect(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="has no pictures"):
        list(collect(tmp_path))
    with pytest.raises(ValueError, match="must be a folder or end in"):
        list(collect(tmp_path / "notes.txt"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="has no records"):
        list(collect(tmp_path / "empty.jsonl"))


def test_damage_becomes_a_fault(tmp_path):
    root = folder_of(tmp_path / "root")
    (root / "0.txt").write_bytes(b"\xff\xfe\x00")
    (root / "1.json").write_text('{"caption": "half')
    (root / "2.json").write_text('{"category": "Cats"}')
    faults = [r.fault for r in collect(root)]
    assert faults[0] == "its caption is not UTF-8; save it as UTF-8"
    assert faults[1].startswith("its JSON cannot be read")
    assert faults[2] == "the category must be one of Nature, Design, People, Synthetic, got 'Cats'"

    lines = ['{"image": "gone.png"}', "[1]", "{", '{"caption": "no picture"}', '{"image_base64": "?"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    faults = [r.fault for r in collect(tmp_path / "a.jsonl")]
    assert "cannot be read: No such file" in faults[0] and faults[3] == "the row has no path or bytes in image"
    assert all(f"line {n} cannot be read" in faults[n - 1] for n in (2, 3, 5))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    assert "b.parquet is damaged after row 0" in next(collect(tmp_path / "b.parquet")).fault


def test_shard_cut_off_in_the_middle(tmp_path):
    write_shards([Record(noise(n), {"raw": f"caption {n}"}) for n in range(4)], tmp_path / "out")
    whole = (tmp_path / "out" / "shard-00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    records = list(collect(tmp_path / "cut.tar"))
    assert [r.image for r in records[:-1]] == [noise(n) for n in range(len(records) - 1)] and 1 < len(records) < 4
    assert "cut off or damaged" in records[-1].fault
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    assert "cut off or damaged" in next(collect(tmp_path / "no.tar")).fault


def test_shards_of_others(tmp_path):
    """Names in folders, dots in extensions, members of one sample only, and a sample without its picture."""
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, content in [
            ("x/1.seg.png", b"mask"),
            ("x/1.jpg", noise(1)),
            ("x/1.txt", b"one"),
            ("x/2.txt", b"two"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    first, second = collect(tmp_path / "a.tar.gz")
    assert (first.image, first.caption, first.origin) == (noise(1), "one", "a.tar.gz:x/1")
    assert second.fault == "the sample has no picture"


def test_fields_that_cannot_be_stored_are_faults():
    assert "must be text" in record_of(b"", {"caption": 3}, "o", {}).fault
    assert "surrogates" in record_of(b"", {"caption": "\ud800"}, "o", {}).fault
    assert "not JSON serializable" in record_of(b"", {"when": object()}, "o", {}).fault


def test_memory_does_not_grow(tmp_path):
    def peak(count):
        tracemalloc.start()
        write_shards((Record(noise(n % 7)) for n in range(count)), tmp_path, shard_records=50)
        assert sum(1 for _ in collect(tmp_path)) == count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(20)  # imports
    assert peak(500) < peak(100) + 2**19
