"""Folders, tables and shards of one's own as sources of a run; what cannot be one is a sentence."""

import io
import tarfile

import pytest
from PIL import Image
from source_helpers import COLOURS, as_bytes, colours_of, files, write_table

from qwen_image_fast.training.data.screen import Rejected
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.run import cache_latents, train
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.tasks import flow


@pytest.mark.parametrize("suffix, as_paths", [(".jsonl", True), (".jsonl", False), (".parquet", True),
                                              (".parquet", False), (".csv", True)])  # fmt: skip
def test_a_table_gives_each_row_once_an_epoch(tmp_path, suffix, as_paths):
    source = make_source(DataRecipe(source=str(write_table(tmp_path, suffix, as_paths))))
    wanted = {f"colour {i}": colour for i, colour in enumerate(COLOURS[:3])}
    assert colours_of(source, 3) == wanted
    assert [source.sample(0, i).caption for i in range(6)] != [source.sample(1, i).caption for i in range(6)]


def test_rows_that_cannot_be_used(tmp_path):
    """What is damaged is left out, and said."""
    root = files(
        tmp_path,
        {
            "a.png": 0,
            "b.png": "",
            "t.jsonl": """{"image": "a.png", "caption": "red"}
{"image": "b.png", "caption": "x"}
{"caption": "no picture"}
{""",
        },
    )
    source, reasons = make_source(DataRecipe(source=str(root / "t.jsonl"))), []
    for i in range(4):
        try:
            assert source.sample(0, i).caption == "red"
        except Rejected as error:
            reasons.append(f"{error.origin} {error.reason}")
    reasons = "\n".join(sorted(reasons))
    assert "t.jsonl:2 broken_file: the file is empty" in reasons
    assert "t.jsonl:3 broken_file: the row has no path or bytes in image" in reasons
    assert "t.jsonl:4 broken_file: line 4 cannot be read" in reasons
    said = "\n".join(source.said())
    assert "4 pictures, none held out" in said and "t.jsonl:2 will be left out: it is no picture that can be" in said
    assert "t.jsonl:4 will be left out: line 4 cannot be read" in said


ROW = '{"image": "a.png", "caption": "red"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.jsonl", "", "must have rows, got .*, which has none"),
        (
            "t.jsonl",
            '{"image": "a.png", "words": "red"}',
            r"t.jsonl:1 has none or an empty one \(1 of 1\): write it, or",
        ),
        (
            "t.jsonl",
            ROW + '{"image": "gone.png", "caption": "x"}',
            r"t.jsonl:2 names .*gone.png, which is not there \(1 of",
        ),
        ("t.csv", "image,caption\na.png,red,blue\n", "t.csv is no CSV table: row 1 has more fields than the first row"),
        ("t.csv", "image,caption\na.png,\n", "every picture needs its caption, t.csv:1 has none or an empty one"),
        ("t.tar.gz", "", "must be a whole, uncompressed tar file"),
    ],
)
def test_tables_that_cannot_be_a_source(tmp_path, name, content, message):
    files(tmp_path, {"a.png": 0, name: content})
    with pytest.raises(RecipeError, match=message):
        make_source(DataRecipe(source=str(tmp_path / name)))


def test_options_that_do_not_fit(tmp_path):
    path = write_table(tmp_path, ".parquet", True)
    with pytest.raises(RecipeError, match="image_column must be a column of .*: image, caption; got 'picture'"):
        make_source(DataRecipe(source=str(path), options={"image_column": "picture"}))
    with pytest.raises(RecipeError, match="data.options must fit the source .*unexpected keyword argument 'column'"):
        make_source(DataRecipe(source=str(path), options={"column": "picture"}))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RecipeError, match=r"table.parquet cannot be read"):
        make_source(DataRecipe(source=str(path)))


RED, GREEN, BLUE, _ = COLOURS
TEXTS = {"a.txt": "red", "b.txt": "green", "c.txt": "blue"}
PICTURES = {"a.png": 0, "b.png": 1, "c.png": 2}
THREE = {"red": RED, "green": GREEN, "blue": BLUE}
FOLDERS = {
    "text": {**PICTURES, **TEXTS},
    "every suffix": {"a.gif": 0, "b.bmp": 1, "deep/c.tif": 2, "a.caption": "red", "b.txt": "green",
                     "deep/c.json": '{"caption": "blue"}'},
    "capitals": {"A.PNG": 0, "A.TXT": "red", "B.Jpeg.PNG": 1, "B.Jpeg.Caption": "green", "c.bmp": 2,
                 "c.JSON": '{"caption": "blue"}'},
    "encodings": {**PICTURES, "a.txt": "\ufeffred\n", "b.txt": "green".encode("utf-16"),
                  "c.txt": "blue".encode("utf-32")},
    "hidden files": {**PICTURES, **TEXTS, "._a.png": "x", ".cache/z.png": 0, ".DS_Store": "x"},
    "metadata.jsonl": {**PICTURES, "metadata.jsonl": """{"file_name": "a.png", "text": "red"}
{"file_name": "b.png", "text": "green"}
{"file_name": "c.png", "text": "blue"}"""},
    "metadata.csv": {**PICTURES, "metadata.csv": "\ufefffile_name,text\na.png,red\nb.png,green\nc.png,blue\n"},
    "metadata in folders": {"one/a.png": 0, "one/metadata.csv": "file_name,caption\na.png,red\n", "two/b.png": 1,
                            "two/c.png": 2, "two/metadata.jsonl": """{"file_name": "b.png", "text": "green"}
{"file_name": "c.png", "text": "blue"}"""},
    "a table of its own": {**PICTURES, "list.csv": "path,caption\na.png,red\nb.png,green\nc.png,blue\n"},
    "a table of something else": {**PICTURES, **TEXTS, "sizes.csv": "name,size\na,3\n"},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    source = make_source(DataRecipe(source=str(files(tmp_path / "f", FOLDERS[name]))))
    assert colours_of(source, 3) == THREE
    said = "\n".join(source.said())
    assert ("2 hidden files or folders are not read" in said) == (name == "hidden files")
    assert ("1 .csv files are of no kind that is read" in said) == (name == "a table of something else")


def test_what_is_not_used_is_said(tmp_path):
    files(
        tmp_path, {**FOLDERS["text"], "d.heic": "x", "notes.txt": "x", "e.png": (tmp_path / "a.png").name, "e.txt": "e"}
    )
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes())
    said = "\n".join(make_source(DataRecipe(source=str(tmp_path))).said())
    assert "1 .heic files are of no kind that is read, such as d.heic" in said
    assert "1 .txt files have no picture, such as notes.txt" in said
    assert "1 picture is a copy of another, " in said
    table = files(tmp_path / "t", {**PICTURES, "metadata.csv": "file_name,text\na.png,red\n"})
    assert "2 pictures stand in no table" in "\n".join(make_source(DataRecipe(source=str(table))).said())


def test_an_empty_picture_folder_and_faults_of_folders(tmp_path):
    def refused(names, message):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        with pytest.raises(RecipeError, match=message):
            make_source(DataRecipe(source=str(files(folder, names))))

    refused({"a.txt": "x"}, "must be a folder of images, got .*, which has none")
    refused(
        {**PICTURES, "a.txt": "red"}, r"b.png has none or an empty one \(2 of 3\): write it, or set data.captions.def"
    )
    refused({**PICTURES, **TEXTS, "a.txt": " \n"}, r"a.png has none or an empty one \(1 of 3\)")
    refused({**PICTURES, **TEXTS, "a.webp": 0}, "a.webp and a.png are two pictures of one name: keep one of them")
    refused({**PICTURES, **TEXTS, "a.caption": "x"}, "a.txt and a.caption are two captions of one name")
    refused({**PICTURES, **TEXTS, "z.mask.png": 0}, "z.mask.png is a mask and its picture is not there")
    refused(
        {**PICTURES, **TEXTS, "a.mask.png": 3}, r"a.mask.png: a mask must be white where .* has no white \(1 of 3\)"
    )


def test_a_caption_in_utf_16_without_its_mark_is_left_out_and_said(tmp_path):
    files(tmp_path, {**PICTURES, **TEXTS, "a.txt": "red".encode("utf-16-le")})
    assert "a.png will be left out: its caption is not UTF-8, perhaps UTF-16 without" in "\n".join(
        make_source(DataRecipe(source=str(tmp_path))).said()
    )


def test_an_animated_picture_is_left_out_and_said(tmp_path):
    files(tmp_path, {**PICTURES, **TEXTS, "d.txt": "two"})
    pictures = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN)]
    pictures[0].save(tmp_path / "d.gif", save_all=True, append_images=pictures[1:])
    said = "\n".join(make_source(DataRecipe(source=str(tmp_path))).said())
    assert "d.gif will be left out: it is no picture that can be read, or an animated one" in said


@pytest.mark.parametrize("as_file", [True, False])
def test_webdataset_shards_of_others(tmp_path, as_file):
    members = [("x/1.png", as_bytes(RED)), ("x/1.txt", b"red"), ("x/2.txt", b"no picture"), ("3.png", as_bytes(GREEN)),
               ("3.json", b'{"caption": "green"}'), ("4.PNG", as_bytes(BLUE)), ("4.caption", b"blue")]  # fmt: skip
    (tmp_path / "f").mkdir()
    for number, chosen in enumerate((members[:3], members[3:])):
        with tarfile.open(tmp_path / "f" / f"{number}.tar", "w") as tar:
            for name, content in chosen if not as_file else members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = make_source(DataRecipe(source=str(tmp_path / "f" / "0.tar" if as_file else tmp_path / "f")))
    assert colours_of(source, 3) == THREE and "1 samples of" in source.said()[1]
    whole = (tmp_path / "f" / "0.tar").read_bytes()
    (tmp_path / "f" / "0.tar").write_bytes(whole[:700])
    with pytest.raises(Rejected, match="cut off"):
        [source.sample(0, i) for i in range(3)]


def test_what_data_filter_wrote(tmp_path):
    """Its folder, with previews beside the shards, and the shards themselves."""
    from qwen_image_fast.training.data.record import Record
    from qwen_image_fast.training.data.shards import write_shards

    records = [Record(as_bytes(colour), {"raw": name}) for name, colour in THREE.items()]
    write_shards(records, tmp_path / "out" / "shards")
    files(tmp_path / "out", {"rejected.png": 0, "report.html": "x"})
    for folder in ("out", "out/shards"):
        assert colours_of(make_source(DataRecipe(source=str(tmp_path / folder))), 3) == THREE


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    (tmp_path / "data").mkdir()
    write_table(tmp_path, ".parquet", False).rename(tmp_path / "data" / "train-0.parquet")
    files(tmp_path, {"README.md": "x", "data/test-0.parquet": "damaged"})
    for name in PICTURES:
        (tmp_path / f"{'abc'.index(name[0])}.png").unlink()
    asked = []

    def download(name, repo_type):
        asked.append((name, repo_type))
        if name == "o/gone":
            raise errors.LocalEntryNotFoundError("no")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = make_source(DataRecipe(source="hub:o/colours", options={"files": "data/train-*"}))
    assert len(colours_of(source, 3)) == 3 and asked == [("o/colours", "dataset")]
    with pytest.raises(RecipeError, match="o/gone is not in the hub's cache, and the hub was not reached"):
        make_source(DataRecipe(source="hub:o/gone"))
    with pytest.raises(RecipeError, match="must be hub:owner/name"):
        make_source(DataRecipe(source="hub:colours"))


def test_what_is_wrong_with_data_is_known_before_a_model_is_loaded(tmp_path, folder, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    for kind in (flow.QwenImagePipeline, flow.QwenImageEditPlusPipeline):
        monkeypatch.setattr(kind, "from_pretrained", loaded)
    (tmp_path / "recipe.yaml").write_text("{steps: 1, device: cpu}")
    files(tmp_path / "f", {**PICTURES, "a.txt": "red"})
    changes = [f"data.source={tmp_path / 'f'}", f"model.folder={folder}", "data.buckets=[[32, 32]]"]
    for run in (train, lambda *names: cache_latents(*names, 4)):
        with pytest.raises(RecipeError, match=r"b.png has none or an empty one \(2 of 3\)"):
            run(tmp_path / "recipe.yaml", changes, tmp_path / run.__name__)
