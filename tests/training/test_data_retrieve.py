"""Retrieval for gaps of the taxonomy: the records that a search of everything finds, once each, and the same again."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_pictures import encoded, noise, photos
from test_data_models import write_siglip
from typer.testing import CliRunner

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.cli import app
from qwen_image_fast.training.data import parts
from qwen_image_fast.training.data.collect import collect
from qwen_image_fast.training.data.embed import CaptionEmbedder, PictureEmbedder
from qwen_image_fast.training.data.filters.captions import ClipScorer
from qwen_image_fast.training.data.recipe import GapRecipe, RetrieveRecipe, SourceRecipe, read_retrieve_recipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.retrieve import retrieve
from qwen_image_fast.training.data.shards import write_shards

pytest.importorskip("faiss", reason="faiss is not installed (extra retrieve)")


def vector(text):
    """Of a text: the same wherever it is made. All lie near one direction, as a language model's states do."""
    rng = np.random.default_rng(list(text.encode()))
    found = rng.normal(size=6) + 4
    return (found / np.linalg.norm(found)).astype(np.float32)


class Ended(Exception):
    pass


class Drawn:
    """Embeds captions by `vector`, notes what it was asked, and ends the run at a record."""

    def __init__(self, ends_at=None):
        self.seen, self.ends_at = [], ends_at

    def records(self, records):
        if self.ends_at in [record.caption for record in records]:
            raise Ended
        self.seen += [record.caption for record in records]
        reasons = [record.fault or ("" if record.caption else "it has no caption") for record in records]
        return [None if why else vector(r.caption) for r, why in zip(records, reasons)], reasons

    def queries(self, texts, pictures):
        return np.stack([vector(text) for text in texts])


GAPS = [
    GapRecipe("owls", 9, ["an owl", "a bird of prey"], category="Nature", least=-1.0),
    GapRecipe("posters", 12, ["a poster"], least=-1.0),
    GapRecipe("rare", 30, [], least=0.6),  # by its name; few are near enough
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """120 records, of which one has no caption, one is there twice and two are in the data set already."""
    folder = tmp_path_factory.mktemp("pool")
    texts = [f"record {number}" if number != 7 else "" for number in range(120)]
    images = [b"picture %d" % (number if number != 40 else 20) for number in range(120)]
    records = [Record(image, {"raw": text}, category="People" if n % 2 else "")
               for n, (image, text) in enumerate(zip(images, texts))]  # fmt: skip
    write_shards(records, folder / "in")
    there = [Record(images[number], {"raw": "there"}, metadata={"node": "owls"}) for number in (3, 4)]
    write_shards(there, folder / "have")
    return folder, texts


def recipe_of(folder, gaps=GAPS, **fields):
    return RetrieveRecipe([SourceRecipe(str(folder / "in"))], [str(folder / "have")], model="x", gaps=gaps, **fields)


def audit(out):
    return pq.read_table(out / "audit.parquet").to_pylist()


def files_of(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and ".retrieving" not in path.parts}  # fmt: skip


def by_brute_force(texts, gaps, missing):
    """{number: (node, score)}: again and again, the nearest pair of all that are left."""
    left = {n: vector(text).astype(np.float64) for n, text in enumerate(texts) if n not in (3, 4, 7, 40)}
    centre = np.mean([*left.values()], 0)

    def cosine(a, b):
        a, b = a - centre, b - centre
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    missing, taken = dict(missing), {}
    while True:
        pairs = [
            (cosine(one, vector(text)), number, gap)
            for number, one in left.items()
            for gap in gaps
            if missing[gap.node]
            for text in gap.texts or [gap.node]
        ]
        pairs = [pair for pair in pairs if pair[0] >= pair[2].least]
        if not pairs:
            return taken
        score, number, gap = max(pairs, key=lambda pair: pair[0])
        taken[number] = gap.node, score
        missing[gap.node] -= 1
        del left[number]


def test_the_nearest_of_all_are_taken(pool, tmp_path):
    folder, texts = pool
    filled = retrieve(recipe_of(folder), tmp_path, embedder=Drawn())
    expected = by_brute_force(texts, GAPS, {"owls": 7, "posters": 12, "rare": 30})
    rows = audit(tmp_path)
    found = {number: row["node"] for number, row in enumerate(rows) if row["kept"]}
    assert found == {number: node for number, (node, _) in expected.items()}
    for number, (node, score) in expected.items():
        assert rows[number]["score"] == pytest.approx(score, abs=2e-5)
        assert rows[number]["reason"].startswith(f"{node}: its cosine to {rows[number]['query']!r} is ")
    counts = {one.node: (one.count, one.there, one.taken) for one in filled}
    assert counts == {"owls": (9, 2, 7), "posters": (12, 0, 12), "rare": (30, 0, counts["rare"][2])}
    assert 0 < counts["rare"][2] < 30  # by its limit
    reasons = {number: rows[number]["reason"] for number in (3, 4, 7, 40)}
    assert reasons == {
        3: "the data set has it", 4: "the data set has it", 7: "it has no caption",
        40: "the file is the same as that of record 21",
    }  # fmt: skip
    others = [row["reason"] for number, row in enumerate(rows) if not row["kept"] and number not in reasons]
    ends = ("others are nearer to every gap", "and nearer ones fill the gap", "less than 0.6")
    assert all(reason.endswith(ends) for reason in others) and {reason[-8:] for reason in others} >= {"than 0.6"}
    records = list(collect(tmp_path / "shards"))
    assert [record.metadata["node"] for record in records] == list(dict(sorted(found.items())).values())
    for record, number in zip(records, sorted(found)):
        assert record.caption == texts[number]
        assert record.category == ("People" if number % 2 else "Nature" if found[number] == "owls" else "")


def test_half_the_memory_finds_nearly_the_same(pool, tmp_path):
    found = []
    for precision in ("float32", "float16"):
        retrieve(recipe_of(pool[0], precision=precision), tmp_path / precision, embedder=Drawn())
        found.append({(row["id"], row["node"]): row["score"] for row in audit(tmp_path / precision) if row["kept"]})
    both = found[0].keys() & found[1].keys()
    assert len(both) >= 0.9 * len(found[0]) and found[0] != found[1]
    assert all(found[0][one] == pytest.approx(found[1][one], abs=2e-3) for one in both)


def test_killed_it_goes_on_and_another_search_makes_no_vector_again(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "RECORDS", 50)
    folder, texts = pool
    with pytest.raises(Ended):
        retrieve(recipe_of(folder), tmp_path / "a", embedder=Drawn("record 60"))
    assert files_of(tmp_path / "a") == {}
    again, counts = Drawn(), []
    retrieve(recipe_of(folder), tmp_path / "a", embedder=again, progress=lambda *now: counts.append(now))
    assert again.seen == texts[50:] and counts == [(50, 120), (50, 120), (20, 120)]
    retrieve(recipe_of(folder), tmp_path / "b", embedder=Drawn())
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") and len(files_of(tmp_path / "a")) == 3
    other = Drawn()
    (one,) = retrieve(recipe_of(folder, [GapRecipe("rare", 3)]), tmp_path / "a", embedder=other)
    assert other.seen == [] and one.taken == 3 and sum(row["kept"] for row in audit(tmp_path / "a")) == 3
    with pytest.raises(ValueError, match="was begun with another recipe \\(by: 'captions' -> 'pictures'\\)"):
        retrieve(recipe_of(folder, by="pictures"), tmp_path / "a", embedder=other)


def test_a_pool_that_grew_is_not_searched_in_part(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(noise(1))
    recipe = RetrieveRecipe([SourceRecipe(str(tmp_path / "in"))], model="x", gaps=[GapRecipe("owls", 1)])
    (one,) = retrieve(recipe, tmp_path / "out", embedder=Drawn())
    assert one.taken == 0  # it has no caption
    (tmp_path / "in" / "b.png").write_bytes(noise(2))
    with pytest.raises(ValueError, match="the sources have other records than before: remove .*retrieving"):
        retrieve(recipe, tmp_path / "out", embedder=Drawn())


def test_captions_by_the_text_encoder():
    """The mean of the states that the pipelines make, whatever else is embedded beside."""
    embedder = CaptionEmbedder("tiny")
    texts = ["a red circle", "a blue square on a white ground", "红色的圆"]
    rows, reasons = embedder.records([Record(b"1", {"raw": text}) for text in texts] + [Record(b"2", {"raw": " "})])
    assert reasons == ["", "", "", "it has no caption"] and rows[3] is None
    pipe = QwenImagePipeline.from_pretrained("tiny", torch_dtype=torch.float32)
    for row, text in zip(rows, texts):
        states = pipe.encode_prompt(text)[0][0].mean(0).numpy()
        assert row == pytest.approx(states / np.linalg.norm(states), abs=2e-5)
    assert np.stack(rows[:3]) == pytest.approx(embedder.queries(texts, []), abs=1e-6)


@pytest.mark.parametrize("kind", ["fixed", "naflex"])
def test_pictures_by_a_model_that_sees(tmp_path, kind):
    """Cosines as `alignment` has them; a picture is nearest to itself."""
    write_siglip(tmp_path / "model", kind)
    files = {name: encoded(pixels[:200, :260]) for name, pixels in photos().items()}
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).with_suffix(".png").write_bytes(content)
    (tmp_path / "in" / "page.png").write_bytes(b"<html>")
    embedder = PictureEmbedder(str(tmp_path / "model"), 10**8)
    rows, reasons = embedder.records([Record(files["chelsea.png"]), Record(b"<html>")])
    assert reasons[0] == "" and "it cannot be decoded" in reasons[1] and rows[1] is None
    score = ClipScorer(str(tmp_path / "model"))(photos()["chelsea.png"][:200, :260], "A cat")
    assert float(rows[0] @ embedder.queries(["A cat"], [])[0]) == pytest.approx(score, abs=1e-5)
    gaps = [{"node": "cats", "count": 1, "pictures": [str(tmp_path / "in" / "chelsea.png")]},
            {"node": "space", "count": 1, "pictures": [str(tmp_path / "in" / "rocket.png")]}]  # fmt: skip
    recipe = {"sources": [{"path": str(tmp_path / "in")}], "by": "pictures", "model": str(tmp_path / "model"),
              "gaps": gaps}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = ["data", "retrieve", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "cats: 0 there, 1 found of 1 missing, cosines 1.000 to 1.000" in result.output
    kept = {row["node"]: row["origin"] for row in audit(tmp_path / "out") if row["kept"]}
    assert kept == {"cats": "chelsea.png", "space": "rocket.png"}


def test_nothing_missing_and_no_model(pool, tmp_path):
    folder, _ = pool
    with pytest.raises(ValueError, match="nothing is missing"):
        retrieve(recipe_of(folder, [GapRecipe("owls", 2)]), tmp_path / "out", embedder=Drawn())
    recipe = tmp_path / "recipe.yaml"
    tree = {"sources": [{"path": str(folder / "in")}], "model": "./nowhere", "gaps": [{"node": "owls", "count": 3}]}
    recipe.write_text(json.dumps(tree))
    result = CliRunner().invoke(app, ["data", "retrieve", str(recipe), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "there is no folder ./nowhere" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("by=words", "by must be captions or pictures"),
        ("model=", "model must be a folder"),
        ("precision=int4", "precision must be of float32, float16"),
        ("gaps=[]", "gaps must name different nodes"),
        ("gaps=[{node: a, count: 1}, {node: a, count: 2}]", "gaps must name different nodes"),
        ("gaps=[{node: a}]", "gaps, of a: count must be at least 1"),
        ("gaps=[{node: a, count: 1, least: 2}]", "gaps, of a: least must be a cosine"),
        ("gaps=[{node: a, count: 1, category: Birds}]", "gaps, of a: category must be of Nature"),
        ("gaps=[{node: a, count: 1, texts: [' ']}]", "gaps, of a: texts must have words each"),
        ("gaps=[{node: a, count: 1, pictures: [a.png]}]", "gaps, of a: pictures must be empty with `by: captions`"),
        ("have=[nowhere]", "have must name folders of shards"),
    ],
)
def test_bad_recipes(tmp_path, change, sentence):
    (tmp_path / "recipe.yaml").write_text("sources: [{path: in}]\nmodel: tiny\ngaps: [{node: owls, count: 3}]\n")
    with pytest.raises(ValueError, match=f"recipe: {sentence}"):
        read_retrieve_recipe(tmp_path / "recipe.yaml", [change])
