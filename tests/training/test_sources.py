"""Tables and pairs of one's own as sources of a run."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from trainer_helpers import small_recipe, start

from qwen_image_fast.training.data.screen import Rejected
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.sources.pairs import EditPairs
from qwen_image_fast.training.sources.table import Table

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def picture(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def as_bytes(colour):
    file = io.BytesIO()
    picture(colour).save(file, "PNG")
    return file.getvalue()


def colours_of(source, count, method="sample"):
    """Caption and colour of so many samples."""
    made = [getattr(source, method)(0, i) for i in range(count)]
    return {sample.caption: tuple(sample.image[0, 0].tolist()) for sample in made}


def write_table(folder, suffix, as_paths):
    rows = []
    for i, colour in enumerate(COLOURS):
        picture(colour).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png" if as_paths else as_bytes(colour), "caption": f"colour {i}"})
    path = folder / f"table{suffix}"
    if suffix == ".jsonl":
        if not as_paths:
            rows = [{"image_base64": base64.b64encode(r["image"]).decode(), "caption": r["caption"]} for r in rows]
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("as_paths", [True, False])
def test_a_table_gives_each_row_once_an_epoch(tmp_path, suffix, as_paths):
    source = make_source(DataRecipe(source=str(write_table(tmp_path, suffix, as_paths))))
    wanted = {f"colour {i}": colour for i, colour in enumerate(COLOURS)}
    assert colours_of(source, 3) == wanted
    assert [source.sample(0, i).caption for i in range(6)] != [source.sample(1, i).caption for i in range(6)]


def test_rows_that_cannot_be_used(tmp_path):
    picture(COLOURS[0]).save(tmp_path / "a.png")
    lines = ['{"image": "a.png", "caption": "red"}', '{"image": "a.png"}', '{"image": "gone.png", "caption": "x"}', "{"]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source, reasons = Table(str(tmp_path / "t.jsonl")), []
    for i in range(4):
        try:
            assert source.sample(0, i).caption == "red"
        except Rejected as error:
            reasons.append(f"{error.origin} {error.reason}")
    reasons = "\n".join(sorted(reasons))
    assert "t.jsonl:2 no_caption" in reasons
    assert "t.jsonl:3 broken_file: the file cannot be read" in reasons
    assert "t.jsonl:4 broken_file: line 4 cannot be read" in reasons


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "must have rows, got .*, which has none"),
        ('{"image": "a.png", "text": "red"}', "need a caption or captions, t.jsonl:1 has none; its other fields: text"),
    ],
)
def test_tables_that_cannot_be_a_source(tmp_path, content, message):
    picture(COLOURS[0]).save(tmp_path / "a.png")
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(RecipeError, match=message):
        make_source(DataRecipe(source=str(tmp_path / "t.jsonl")))


def test_parquet_without_the_column_or_damaged(tmp_path):
    path = write_table(tmp_path, ".parquet", True)
    with pytest.raises(RecipeError, match="image_column must be a column of .*: image, caption; got 'picture'"):
        make_source(DataRecipe(source=str(path), options={"image_column": "picture"}))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RecipeError, match=r"table.parquet cannot be read"):
        make_source(DataRecipe(source=str(path)))


def write_pairs(root, layout):
    root.mkdir(exist_ok=True)
    names = {}
    for i, colour in enumerate(COLOURS):
        before, after = f"p{i}.before.png", f"p{i}.after.jpg"
        if layout == "folders":
            before, after = f"before/p{i}.png", f"after/p{i}.png"
        for name, made in ((before, picture((9, 9, 9), (48, 32))), (after, picture(colour))):
            (root / name).parent.mkdir(exist_ok=True)
            made.save(root / name, quality=100, subsampling=0)
        names[i] = before, after
        if layout != "table":
            (root / f"p{i}.txt").write_text(f"colour {i}\n", encoding="utf-8")
    if layout == "table":
        rows = [{"image": a, "references": [b, b], "instruction": f"colour {i}"} for i, (b, a) in names.items()]
        (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("layout, references", [("folders", 1), ("names", 1), ("table", 2)])
def test_pairs(tmp_path, layout, references):
    recipe = DataRecipe(source=str(write_pairs(tmp_path / "pairs", layout)), tasks={"ti2i": 1.0})
    source = make_source(recipe)
    found = colours_of(source, 3, "edit")
    for i, colour in enumerate(COLOURS):
        assert np.abs(np.subtract(found[f"colour {i}"], colour)).max() <= 3  # JPEG
    made = source.edit(0, 0)
    assert len(made.references) == references
    assert all(r.shape == (32, 48, 3) and (r == 9).all() for r in made.references)
    with pytest.raises(RecipeError, match="data.tasks must not have t2i: the source .* has edits alone"):
        make_source(DataRecipe(source=recipe.source))


def test_one_instruction_for_all_pairs(tmp_path):
    root = write_pairs(tmp_path / "pairs", "folders")
    for text in root.glob("*.txt"):
        text.unlink()
    assert EditPairs(str(root), instruction="paint it").edit(0, 0).caption == "paint it"
    with pytest.raises(RecipeError, match="every pair needs an instruction, .*p0.png has none: write .*p0.txt"):
        EditPairs(str(root))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1 of .*pairs.jsonl must be"),
        ('{"image": "a.png"}', "line 1 of .* must be .*references"),
        ('{"image": "a.png", "references": [], "instruction": "x"}', "must have an instruction and at least one"),
        ('{"image": "a.png", "references": "b.png", "instruction": " "}', "must have an instruction and at least one"),
        ('{"image": "a.png", "references": "gone.png", "instruction": "x"}', "names .*gone.png, which is not there"),
    ],
)
def test_tables_of_pairs_that_are_wrong(tmp_path, line, message):
    for name in ("a.png", "b.png"):
        picture(COLOURS[0]).save(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text(line)
    with pytest.raises(RecipeError, match=message):
        EditPairs(str(tmp_path))


def test_a_picture_without_its_partner_and_two_of_one_name(tmp_path):
    root = write_pairs(tmp_path / "pairs", "folders")
    (root / "before" / "p1.png").unlink()
    with pytest.raises(RecipeError, match="every picture needs its partner, .*after/p1.png has none"):
        EditPairs(str(root))
    picture(COLOURS[0]).save(root / "after" / "p0.webp")
    with pytest.raises(RecipeError, match="p0.webp and p0.png have the same name"):
        EditPairs(str(root))


def test_a_run_learns_from_pairs(folder, tmp_path):
    root = write_pairs(tmp_path / "pairs", "names")
    recipe = small_recipe(folder, steps=2, data__source=str(root), data__options={}, data__tasks={"ti2i": 1.0})
    trainer = start(recipe, tmp_path / "run")
    trainer.run()
    assert trainer.step == 2
