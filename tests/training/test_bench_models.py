"""Detectors and CLIPs of folders as judges: rules by hand, small random models from prompts to page, refusals."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from bench_folders import LABELS, clip, llava, mask2former, yolos
from bench_helpers import lines, picture, started
from PIL import Image
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.evaluation.bench import judges
from qwen_image_fast.training.evaluation.bench.clip import Clip, ask_clip_score, clip_score
from qwen_image_fast.training.evaluation.bench.coco import CLASSES, class_names
from qwen_image_fast.training.evaluation.bench.detections import fault
from qwen_image_fast.training.evaluation.bench.detector import Detector, found_by
from qwen_image_fast.training.evaluation.bench.items import Item, Question
from qwen_image_fast.training.evaluation.bench.judges import Judge
from qwen_image_fast.training.evaluation.bench.model_folders import folder_name
from qwen_image_fast.training.evaluation.bench.object_colours import COLOURS, Found, ObjectColours, cut_out
from qwen_image_fast.training.evaluation.bench.reading import objects, read_text

RED_DOG = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}
DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")
    mask2former(parent / "finder")
    mask2former(parent / "two-classes", labels=["cat", "dog"])
    yolos(parent / "boxes")
    clip(parent / "looker")
    llava(parent / "seer")
    for name, like in (("pickled", "finder"), ("pickled-clip", "looker"), ("pickled-seer", "seer")):
        shutil.copytree(parent / like, parent / name)
        (parent / name / "model.safetensors").rename(parent / name / "pytorch_model.bin")
    shutil.copytree(parent / "finder", parent / "unprepared")
    (parent / "unprepared/preprocessor_config.json").unlink()
    shutil.copytree(parent / "seer", parent / "unprepared-seer")
    (parent / "unprepared-seer/tokenizer.json").unlink()
    shutil.copytree(parent / "seer", parent / "silent")
    (parent / "silent/chat_template.jinja").unlink()
    (parent / "words").mkdir()
    (parent / "words/config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return parent


# ---- classes, objects, colours ----------------------------------------------------------------------------------


def test_classes_by_any_of_their_names():
    assert len(set(CLASSES)) == 80
    assert class_names(dict(enumerate(LABELS))) == dict(enumerate(CLASSES))
    coco = [
        {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}.get(c, c) for c in CLASSES
    ]
    # As DETR has them: numbers with gaps, and no name there; and a panoptic detector's ground.
    assert class_names({2 * i: label for i, label in enumerate(coco)} | {1: "N/A", 3: "playingfield"}) == {
        2 * i: name for i, name in enumerate(CLASSES)
    }
    with pytest.raises(ValueError, match="must have the 80 classes of COCO in id2label, got no person and 77 more"):
        class_names({0: "cat", 1: "dog"})


def test_objects_of_queries(folders):
    """Two queries of a picture of 4 x 4: the class's probability times the mean of the mask's above half."""
    classes, masks = torch.full((2, 81), -60.0), torch.full((2, 4, 4), -5.0)
    dog, tv, cat = (CLASSES.index(name) for name in ("dog", "tv", "cat"))
    classes[0, [dog, 80]] = torch.tensor([0.9, 0.1]).log()  # 80: none
    classes[1, [tv, dog, cat]] = torch.tensor([0.6, 0.35, 0.05]).log()
    masks[0, 1:3, 2:4] = math.log(3)  # 3/4
    masks[1, 0, :2], masks[1, 0, 2:] = math.log(9), math.log(4)  # 9/10 and 8/10
    found = Detector(folders / "finder")._from_queries(classes, masks, (4, 4))
    assert [(one.name, one.box) for one in found] == [("dog", (2, 1, 4, 3)), ("tv", (0, 0, 4, 1))]
    assert [one.score for one in found] == pytest.approx([0.9 * 0.75, 0.6 * 0.85])  # the dog of the second has 0.2975
    assert found[0].mask.sum() == 4 and found[0].mask[1:3, 2:4].all()
    masks[1, 0] = math.log(9)  # and now 0.315: a query may be two objects
    found = Detector(folders / "finder")._from_queries(classes, masks, (4, 4))
    assert [one.name for one in found] == ["dog", "tv", "dog"] and found[2].score == pytest.approx(0.35 * 0.9)
    found = Detector(folders / "finder")._from_queries(classes, masks, (8, 8))
    assert found[0].mask.shape == (8, 8) and found[1].box[::2] == (0, 8)


def test_an_object_is_cut_out_on_grey():
    mask = np.zeros((4, 6), bool)
    mask[1, 2:4] = True
    shown = cut_out(picture("red", (6, 4)), Found("dog", 1.0, (1.6, 0.7, 4.4, 2.2), mask))
    assert shown.size == (2, 1) and shown.getcolors() == [(2, (255, 0, 0))]
    shown = cut_out(picture("red", (6, 4)), Found("dog", 1.0, (1, 0, 4, 2), mask))
    assert sorted(shown.getcolors()) == [(2, (255, 0, 0)), (4, (153, 153, 153))]
    assert shown.getpixel((0, 1)) == (153, 153, 153) and shown.getpixel((1, 1)) == (255, 0, 0)
    # Without a mask what is behind stays; a box without a pixel is one.
    assert cut_out(picture("red", (6, 4)), Found("dog", 1.0, (1, 0, 4, 2))).getcolors() == [(6, (255, 0, 0))]
    assert cut_out(picture("red", (6, 4)), Found("dog", 1.0, (2.1, 1.1, 2.2, 1.3))).size == (1, 1)


class HandMade:
    """A CLIP in which a text points along its colour, but "object" along another; a picture as it is told to."""

    name = "by hand"

    def __init__(self, *pictures):
        self.pictures, self.asked, self.shown = lambda crops: self.show(crops, pictures), [], []

    def show(self, crops, told):
        self.shown += crops
        return torch.tensor([told[i] for i in range(len(crops))])

    def texts(self, texts):
        self.asked += texts
        found = torch.zeros(len(texts), 11)
        for i, text in enumerate(texts):
            colour = next(j for j, c in enumerate(COLOURS) if text.startswith(f"a photo of a {c}"))
            found[i, 10 if text.endswith("object") else colour] = 1.0
        return found


def test_colours_by_hand():
    """Of each colour the mean of (1, 0), (1, 0) and (0, 1), of length 1: (2, 1) / sqrt 5."""
    along = [0.0] * 11
    model = HandMade([*along[:4], 0.6, 0.5, *along[6:]], [0.7, *along[1:8], 0.71, 0.0, 0.0])
    colours = ObjectColours(model)
    made = colours.directions("cup")
    assert model.asked[:4] == ["a photo of a red cup", "a photo of a red-colored cup", "a photo of a red object",
                               "a photo of a orange cup"] and len(model.asked) == 30  # fmt: skip
    expected = torch.zeros(10, 11)
    expected[range(10), range(10)], expected[:, 10] = 2 / math.sqrt(5), 1 / math.sqrt(5)
    torch.testing.assert_close(made, expected)
    found = [Found("cup", 1.0, (0, 0, 2, 2)), Found("cup", 0.9, (0, 0, 4, 4))]
    assert colours(picture("red"), found) == ["blue", "black"]
    assert [shown.size for shown in model.shown] == [(2, 2), (4, 4)] and len(model.asked) == 30  # texts asked once
    assert colours(picture("red"), []) == []


def test_a_detector_names_the_colours_that_are_asked_for(tmp_path):
    """Two dogs, of which one is asked for: the surer gets its colour; a cat has none. No CLIP, no colour."""
    picture("red").save(tmp_path / "00000-0.png")
    seen = [Found("dog", 0.8, (0, 0, 9, 9)), Found("cat", 0.95, (0, 0, 9, 9)), Found("dog", 0.9, (5, 5, 9, 9))]
    colours = ObjectColours(HandMade([1.0] + [0.0] * 10))
    question = Question("00000-0", "", "", (tmp_path / "00000-0.png",), objects, RED_DOG)
    told = json.loads(found_by(lambda shown: seen, colours)(question))
    assert [one.get("color") for one in told] == [None, None, "red"]
    assert objects(json.dumps(told)) == told and fault(RED_DOG, told) is None
    assert told[2] == {"class": "dog", "score": 0.9, "box": [5, 5, 9, 9], "color": "red"}
    with pytest.raises(LookupError, match="00000-0 asks for colours, which need a CLIP"):
        found_by(lambda shown: seen, None)(question)


# ---- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "masked"), [("finder", True), ("boxes", False)])
def test_a_detector_of_a_folder(name, masked, folders):
    found = Detector(folders / name)(Image.new("RGBA", (40, 24), "red"))
    assert found and {one.name for one in found} == {"dog"}
    for one in found:
        left, top, right, bottom = one.box
        assert 0 <= left < right <= 40 and 0 <= top < bottom <= 24 and 0.3 < one.score <= 1
        assert one.mask.shape == (24, 40) if masked else one.mask is None
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_a_clip_of_a_folder(folders):
    """The cosine is the model's own; a text beyond the context is cut."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folders / "looker"), CLIPProcessor.from_pretrained(folders / "looker")
    mine = Clip(folders / "looker")
    texts = ["a red dog", "a photo of a blue-colored cup"]
    with torch.inference_mode():
        output = model(**processor(text=texts, images=[picture("red")], return_tensors="pt", padding=True))
    torch.testing.assert_close(mine.pictures([picture("red")]), output.image_embeds.cpu())
    torch.testing.assert_close(mine.texts(texts), output.text_embeds.cpu(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine.texts(["dog" * 100]), mine.texts(["dog" * 50]))


def test_names_of_folders(tmp_path):
    assert folder_name(tmp_path / "mask2former-swin-small-coco-instance") == "mask2former-swin-small-coco-instance"
    assert folder_name(tmp_path / "models--openai--clip-vit-large-patch14/snapshots/32bd") == "clip-vit-large-patch14"


# ---- CLIPScore --------------------------------------------------------------------------------------------------


def test_clip_score_by_hand(tmp_path):
    assert clip_score(0.32) == 0.8 and clip_score(-0.1) == 0.0
    (question,) = ask_clip_score(Item("a", "a sign that says 'Hi'", "2 regions"), 0, tmp_path / "a-0.png")
    assert question.key == "a-0.clip" and question.prompt == "A photo depicts a sign that says 'Hi'"
    assert question.read("0.2") == 0.5


def test_clip_scores_come_beside_the_readers(tmp_path):
    """Eight pictures with cosines of 0.1 to 0.8: the mean is 2.5 times 0.45. The reader is not asked again."""
    run = started("cvtg", tmp_path)
    reader = Judge("reader", "reader", lambda question: "WORD0\nword1")
    run.score("reader", run.judge(reader, 1))
    before = json.loads((run.out / "results.json").read_text())
    assert before["notes"] == ["not computed, as it needs a network of its own: CLIPScore; --clip gives one"]
    cosines = iter(range(1, 9))
    looker = Judge("looker", "clip", lambda question: str(next(cosines) / 10))
    silent = Judge("reader", "reader", lambda question: pytest.fail("asked again"))
    for _ in range(2):  # the second time no cosine is left
        table, _ = run.score("reader", run.judge(silent, 1) | run.judge(looker, 1), "looker")
    assert table[-1] == ["CLIPScore (by looker)", "1.125", "8", "0.8017"]
    after = json.loads((run.out / "results.json").read_text())
    assert after["scores"][:-1] == before["scores"] and after["notes"] == [] and after["wrong"] == before["wrong"]
    assert after["scores"][-1] == {"name": "CLIPScore", "value": pytest.approx(1.125), "of": 8, "judge": "looker"}
    kept = [json.loads(line) for line in (run.out / "answers.jsonl").read_text().splitlines()]
    assert [r["value"] for r in kept if r["judge"] == "looker"] == pytest.approx([0.25 * i for i in range(1, 9)])


def test_a_cosine_of_a_folder(folders, tmp_path):
    picture("red").save(tmp_path / "a-0.png")
    (question,) = ask_clip_score(Item("a", "a red dog", ""), 0, tmp_path / "a-0.png")
    model = Clip(folders / "looker")
    (seen,), (said,) = model.pictures([picture("red")]), model.texts(["A photo depicts a red dog"])
    judge = judges.find_clip(folders / "looker")
    assert (judge.name, judge.kind) == ("looker", "clip") and float(judge.ask(question)) == float(seen @ said)


# ---- the command ------------------------------------------------------------------------------------------------


def bench(*arguments):
    return CliRunner().invoke(app, ["evaluate", "bench", *map(str, arguments)])


@pytest.fixture
def geneval(tmp_path, monkeypatch):
    """Prompts and grids of pictures, which need no drawing."""
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "data/evaluation_metadata.jsonl", [DOG, RED_DOG])
    (tmp_path / "grids").mkdir()
    for name in ("00000", "00001"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(f"grids/{name}.png")
    return ["geneval", "tiny", "--prompts", "data", "--grids", "grids", "--out", "out"]


def test_geneval_from_prompts_to_page(geneval, folders, tmp_path, monkeypatch):
    judged = [*geneval, "--judge", folders / "finder", "--clip", folders / "looker"]
    result = bench(*judged)
    assert result.exit_code == 0, result.output
    assert "by finder and looker" in result.output and "| single_object | 1 | 4 |" in result.output
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {score["judge"] for score in found["scores"]} == {"finder and looker"} and found["senseless"] == []
    kept = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    coloured = {r["key"]: [one["color"] for one in r["value"] if "color" in one] for r in kept}
    assert len(kept) == 8 and all(r["value"] for r in kept)
    for key, names in coloured.items():
        assert names == [] if key.startswith("00000") else len(names) == 1 and names[0] in COLOURS
    # The second time nothing is read or asked.
    monkeypatch.setattr(Detector, "_loaded", lambda self: pytest.fail("read"))
    monkeypatch.setattr(Clip, "_loaded", lambda self: pytest.fail("read"))
    assert bench(*judged).exit_code == 0
    assert json.loads((tmp_path / "out/results.json").read_text()) == found


def test_a_vision_language_model_of_a_folder_judges(geneval, folders, tmp_path, monkeypatch):
    """One with random weights: it is asked, and what it says is no answer to any question, so there is no score."""
    monkeypatch.setattr(judges, "_LONGEST", 4)
    result = bench(*geneval, "--count", "1", "--judge", folders / "seer")
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "the judge made no sense whatever it was asked" in said, result.output
    assert not (tmp_path / "out/results.json").exists()


def test_no_clip_is_needed_where_no_colour_is_asked_for(geneval, folders, tmp_path):
    result = bench(*geneval, "--count", "1", "--judge", folders / "boxes", "--judge-model", "YOLOS")
    assert result.exit_code == 0 and "by YOLOS |" in result.output, result.output
    assert json.loads((tmp_path / "out/results.json").read_text())["judge"] == "YOLOS"


@pytest.mark.parametrize(
    ("judge", "looker", "sentence"),
    [
        ("finder", None, "names colours: a detector does not, and 1 of 2 prompts ask for them"),
        ("two-classes", "looker", "must have the 80 classes of COCO in id2label, got no person and 77 more"),
        ("looker", "looker", "or model for object detection of transformers, got CLIPModel in"),
        ("nothing", "looker", "--judge must be a folder with a vision-language model or a detector"),
        ("words", None, "vision-language model of transformers, which sees pictures, got llama in"),
        ("pickled-seer", None, "--judge must have its weights as safetensors"),
        ("unprepared-seer", None, "what prepares words and pictures for --judge"),
        ("silent", None, "silent has no tokenizer or no chat template"),
        ("pickled", "looker", "--judge must have its weights as safetensors"),
        ("unprepared", "looker", "has no preprocessor_config.json"),
        ("finder", "pickled-clip", "--clip must have its weights as safetensors"),
        ("finder", "finder", "--clip must be a folder with a CLIP of transformers, got mask2former in"),
        ("finder", "nothing", "--clip must be a folder with a CLIP of transformers"),
        ("finder", "finde", "finde; did you mean"),
        ("found.jsonl", "looker", "--clip must be given with a detector's folder as --judge, got"),
        (None, "looker", "--clip must come with --judge, a detector's folder; without --judge pictures are drawn"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_drawing(judge, looker, sentence, geneval, folders, tmp_path):
    (folders / "nothing").mkdir(exist_ok=True)
    lines(folders / "found.jsonl", [{"picture": "00000-0", "objects": []}])
    options = [*(["--judge", folders / judge] if judge else []), *(["--clip", folders / looker] if looker else [])]
    result = bench(*geneval, *options)
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and sentence in said and "Traceback" not in said, result.output
    assert not list(tmp_path.glob("out/pictures/*"))
    if "pickle" in f"{judge} {looker}":
        assert "holds only pickled weights (pytorch_model.bin); pickles can run code and are not read" in said


def test_other_benchmarks_refuse_detectors_and_clips(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    result = bench("dpg", "tiny", "--prompts", "data", "--judge", folders / "finder")
    assert "--judge must be a chat model, got a detector" in " ".join(result.output.split()), result.output
    result = bench("dpg", "tiny", "--prompts", "data", "--judge", "x", "--clip", folders / "looker")
    assert "--clip must be left out: of dpg no score is by a CLIP" in " ".join(result.output.split())


def test_cvtg_from_prompts_to_page(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judges, "read_by_ocr", lambda: lambda question: "word0 word1")
    started("cvtg", tmp_path, pictures=1)
    (tmp_path / "grids").mkdir()
    for path in (tmp_path / "out/pictures").iterdir():
        Image.open(path).resize((64, 64)).save(tmp_path / "grids" / f"{path.stem.removesuffix('-0')}.png")
    result = bench("cvtg", "tiny", "--prompts", "prompts", "--grids", "grids", "--out", "scored", "--judge", "rapidocr",
                   "--clip", folders / "looker")  # fmt: skip
    assert result.exit_code == 0 and "CLIPScore (by looker)" in result.output, result.output
    found = json.loads((tmp_path / "scored/results.json").read_text())["scores"]
    assert {s["name"]: s["judge"] for s in found}["NED"] == "RapidOCR" and found[-1]["judge"] == "looker"
    assert 0 <= found[-1]["value"] <= 2.5 and read_text("NONE") == ""
