"""Tasks of vision on pictures of one's own: scores by hand, and what is wrong with a folder before a model is read."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
from qwen_image_fast.training.evaluation import evaluate_vision as report
from qwen_image_fast.training.evaluation.cli import app
from qwen_image_fast.training.evaluation.vision_data import Examples
from qwen_image_fast.training.evaluation.vision_metrics import depth_scores, ssim
from qwen_image_fast.training.synthesis.scenes import FAR, GROUND, NEAR

DOCS = Path(__file__).parents[2] / "docs"
DEPTH = {"image": "a.png", "task": "depth", "truth": "a.npy"}
SEGMENT = {"image": "a.png", "task": "segment", "truth": "mask.png", "instruction": "segment the cup"}
VIEW = {"image": "a.png", "task": "view", "truth": "b.png", "instruction": "turn left"}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    np.save(tmp_path / "a.npy", rng.uniform(1, 5, (24, 36)).astype(np.float32))
    mask = np.zeros((24, 36), np.uint8)
    mask[6:18, 9:27] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(rng.integers(500, 4000, (24, 36)).astype(np.uint16)).save(tmp_path / "depth16.png")
    return tmp_path


def written(folder, *lines):
    said = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(said) + "\n", encoding="utf-8")
    return folder


def greys(*values):
    return np.repeat(np.array([values], np.uint8)[..., None], 3, axis=2)


def one_row(folder, truth, **fields):
    Image.fromarray(greys(*[9] * len(truth))).save(folder / "row.png")
    np.save(folder / "row.npy", np.array([truth]))
    written(folder, {"image": "row.png", "task": "depth", "truth": "row.npy", **fields})


# By least squares 1, 2, 4 at 0, 50, 100 are told as 5/6, 7/3, 23/6.
@pytest.mark.parametrize(
    ("limits", "error"),
    [((0.5, 10), (1 / 6 + 1 / 6 + 1 / 24) / 3), ((1, 4), (1 / 6 + 1 / 24) / 3), (None, (1 / 6 + 1 / 24) / 3)],
)
def test_linear_depth_by_hand(folder, limits, error):
    one_row(folder, [1.0, 2.0, 4.0], **({"range": list(limits)} if limits else {}))
    found = Examples(folder, depth_answers="linear")[0].scores(greys(0, 50, 100))
    assert found == {"AbsRel": pytest.approx(error), "δ1": 1.0}


@pytest.mark.parametrize("answer", [(0, 50, 100), (100, 50, 0)])
def test_inverse_depth_by_hand(folder, answer):
    one_row(folder, [1.0, 0.5, 0.25], range=[0.01, 100])
    found = Examples(folder)[0].scores(greys(*answer))
    assert found["AbsRel"] == pytest.approx((1 / 5 + 1 / 7 + 1 / 23) / 3)  # 6/5, 3/7 and 6/23; either sign of the scale
    assert found["δ1"] == 1.0


def test_pixels_without_a_depth_do_not_count(folder):
    truth = [1.0, 2.0, 4.0, np.nan, np.inf, 0.0, 3.0]
    one_row(folder, [*truth, 50.0], range=[0.5, 10])
    np.save(folder / "valid.npy", np.array([[1, 1, 1, 1, 1, 1, 0, 1]]))
    lines = [{"image": "row.png", "task": "depth", "truth": "row.npy", "valid": "valid.npy", "range": [0.5, 10]}]
    one = Examples(written(folder, *lines), depth_answers="linear")[0]
    assert one.valid.tolist() == [[True] * 3 + [False] * 5]
    found = one.scores(greys(0, 50, 100, 7, 200, 3, 90, 255))
    assert found["AbsRel"] == pytest.approx(1 / 8)


def test_a_perfect_answer_and_the_limits():
    truth, every = np.array([[2.0, 4.0, 8.0]]), np.ones((1, 3), bool)
    for inverse, told in ((True, 1 / truth), (False, truth)):
        assert depth_scores(3 - 7 * told, truth, every, None, (1, 9), inverse) == (pytest.approx(0, abs=1e-12), 1.0)
    clipped = depth_scores(truth, truth, every, None, (3, 9), inverse=False)
    assert clipped == (pytest.approx(0.5 / 3), pytest.approx(2 / 3))  # 2 becomes 3


def test_depth_of_a_png_is_its_values_times_the_scale(folder):
    written(folder, DEPTH | {"truth": "depth16.png", "scale": 0.001})
    one = Examples(folder)[0]
    with Image.open(folder / "depth16.png") as image:
        assert np.allclose(one.truth, np.asarray(image) / 1000) and one.truth.min() >= 0.5


def test_segments_by_hand(folder):
    written(folder, SEGMENT)
    one = Examples(folder)[0]
    answer = np.zeros((24, 36, 3), np.uint8)
    answer[6:18, :18] = 128  # 216 pixels, of which 108 are of the 216 of the object
    assert one.scores(answer) == {"IoU": pytest.approx(108 / 324)}
    np.save(folder / "right.npy", np.arange(36)[None].repeat(24, 0) >= 9)
    written(folder, SEGMENT | {"valid": "right.npy"})
    assert Examples(folder)[0].scores(answer) == {"IoU": pytest.approx(108 / 216)}


def test_views_by_hand(folder):
    flat = np.full((24, 36, 3), 100, np.uint8)
    Image.fromarray(flat).save(folder / "b.png")
    found = Examples(written(folder, VIEW))[0].scores(flat + 51)
    c = (0.01 * 255) ** 2
    assert found["PSNR"] == pytest.approx(20 * np.log10(5))
    assert found["SSIM"] == pytest.approx((2 * 100 * 151 + c) / (100**2 + 151**2 + c))


def test_ssim_is_that_of_others():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(1)
    a = rng.integers(0, 256, (40, 31, 3), dtype=np.uint8)
    b = (a * 0.6 + rng.integers(0, 100, a.shape)).astype(np.uint8)
    wanted = metrics.structural_similarity(
        a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(a, b) == pytest.approx(wanted, abs=1e-12) and ssim(a, a) == 1.0


def test_answers_of_another_size_are_brought_to_the_truths(folder):
    written(folder, DEPTH, SEGMENT, VIEW)
    examples = Examples(folder, size=18)
    for one in examples:
        assert one.pair.source.shape == (12, 18, 3) and one.pair.target.shape == one.picture.shape == (24, 36, 3)
    small = np.asarray(Image.fromarray(examples[1].pair.target).resize((18, 12)))
    assert examples[1].scores(small)["IoU"] > 0.95
    assert examples[2].scores(examples[2].pair.source)["PSNR"] > 5


def test_scenes_as_own_pictures_score_as_scenes_do(folder):
    asked = report.held_out_tasks("depth", 3, size=64)
    for number, one in enumerate(asked):
        Image.fromarray(one.pair.source).save(folder / f"{number}.png")
        np.save(folder / f"{number}.npy", one.view.depth)  # infinite beyond the ground
    lines = [{"image": f"{i}.png", "task": "depth", "truth": f"{i}.npy", "range": [NEAR, FAR]} for i in range(3)]
    assert all(one.view.depth.min() >= NEAR and one.view.depth[one.view.ids >= GROUND].max() <= FAR for one in asked)
    for one, given in zip(asked, Examples(written(folder, *lines)), strict=True):
        for image in (one.pair.source, one.pair.target):
            found = report.scores(one, image)
            assert given.scores(image) == {name: pytest.approx(found[name]) for name in ("AbsRel", "δ1")}


def test_which_lines_are_taken_and_in_which_language(folder):
    written(folder, VIEW, DEPTH, "", DEPTH | {"instruction": "map it"}, DEPTH, SEGMENT)
    told = [one.pair.instruction for one in Examples(folder, ("depth", "segment"), count=2, language="zh")]
    assert told == ["画出深度", "map it", "segment the cup"]


def test_the_right_answer_is_best_and_the_trivial_one_beside_it(folder, tmp_path):
    examples = Examples(written(folder, *[DEPTH, SEGMENT, VIEW] * 5))
    answers = report.evaluate(lambda pairs, first: [pair.target for pair in pairs], examples, batch=4)
    totals = report.write_report(answers, tmp_path / "out", "right", {"data": "here"})
    assert totals["depth"]["model"]["AbsRel"] < 0.02 < 0.3 < totals["depth"]["trivial"]["AbsRel"]
    assert totals["segment"]["model"]["IoU"] == totals["view"]["model"]["SSIM"] == 1.0
    assert totals["segment"]["trivial"]["IoU"] < 0.5 and totals["view"]["trivial"]["PSNR"] < 10
    assert totals["view"]["pictures"] == 5 and totals["view"]["trivial answer"] == "the source"
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["pictures"]
    assert len(rows) == 15 and all(row["image"] == "a.png" for row in rows)


BAD = {
    "no JSON": (["{oops"], "line 1 of .*metadata.jsonl: it must be JSON"),
    "no object": ([DEPTH, "[1]"], r"line 2 of .*: it must be a JSON object, got \[1\]"),
    "another field": ([DEPTH | {"instrution": "x"}], "fields must be of .*, got instrution; did you mean instruction"),
    "no truth": ([{"image": "a.png", "task": "depth"}], "line 1 of .*: it must have truth"),
    "another task": ([DEPTH, "", DEPTH | {"task": "smell"}], "line 3 .*: task must be of depth, segment, view, got s"),
    "a number": ([DEPTH | {"image": 3}], "image must be a text, got 3"),
    "no file": ([DEPTH | {"truth": "c.npy"}], "line 1 of .*: truth must be a file of the folder, there is no c.npy"),
    "no picture": ([DEPTH | {"image": "a.npy"}], "line 1 of .*: image a.npy could not be read as a picture"),
    "no array": ([DEPTH | {"truth": "text.npy"}], "truth must be an array as numpy.save writes it, got text.npy"),
    "pickle": ([DEPTH | {"truth": "object.npy"}], "truth must be an array as numpy.save .* object.npy"),
    "complex": ([DEPTH | {"truth": "complex.npy"}], "truth must be numbers, got complex128 in complex.npy"),
    "shape": ([DEPTH | {"truth": "small.npy"}], r"truth must be \[24, 36\] as its image, got \[24, 35\] in small.npy"),
    "size of a view": ([VIEW | {"truth": "small.png"}], r"truth must be \[24, 36, 3\] as its image, got \[24, 35, 3\]"),
    "NaN": ([DEPTH | {"truth": "nan.npy"}], "a pixel that is valid, finite, above 0 and in range, got none in nan.npy"),
    "out of range": ([DEPTH | {"range": [10, 20]}], "truth must have a pixel that is valid"),
    "nothing valid": ([DEPTH | {"valid": "black.png"}], "truth must have a pixel that is valid"),
    "nothing asked for": ([SEGMENT | {"truth": "black.png"}], "truth must have a pixel of the object .* in black.png"),
    "8 bits": ([DEPTH | {"truth": "mask.png", "scale": 1}], "a PNG of 16 bits for a depth, got L in mask.png"),
    "no scale": ([DEPTH | {"truth": "depth16.png"}], "scale must be there with depth16.png"),
    "a scale too many": ([DEPTH | {"scale": 2}], "scale must be left out with a.npy"),
    "scale": ([DEPTH | {"truth": "depth16.png", "scale": 0}], "scale must be a number above 0, got 0"),
    "range": ([DEPTH | {"range": [5, 1]}], r"range must be \[least, greatest\] with .*, got \[5, 1\]"),
    "range of a view": ([VIEW | {"range": [1, 5]}], "range must be left out of the task view"),
    "no instruction": ([VIEW | {"instruction": " "}], "instruction must be a text"),
    "instruction": ([dict(list(VIEW.items())[:3])], "instruction must be there for the task view, as"),
    "no line": ([""], "must have a line with a task of depth, segment, view, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_before_a_model_is_read(folder, case, tmp_path, monkeypatch):
    (folder / "text.npy").write_text("no array")
    np.save(folder / "object.npy", np.array([{}], object), allow_pickle=True)
    np.save(folder / "complex.npy", np.ones((24, 36), complex))
    np.save(folder / "small.npy", np.ones((24, 35)))
    np.save(folder / "nan.npy", np.full((24, 36), np.nan))
    Image.new("RGB", (35, 24)).save(folder / "small.png")
    Image.new("L", (36, 24)).save(folder / "black.png")
    lines, wanted = BAD[case]
    with pytest.raises(ValueError, match="evaluate vision: .*" + wanted):
        Examples(written(folder, *lines))
    monkeypatch.setattr(QwenImageEditPlusPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("was read"))
    result = CliRunner().invoke(app, ["vision", "tiny", "--data", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_folder_without_examples(tmp_path):
    with pytest.raises(ValueError, match="evaluate vision: data must be a folder with metadata.jsonl, got .*/none"):
        Examples(tmp_path / "none")
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be text in UTF-8"):
        Examples(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", ".", "--tasks", "edges"], "of depth, segment, view, got edges"),
        (["--data", ".", "--depth-answers", "log"], "inverse or linear, got log"),
        (["--depth-answers", "linear"], "must come with --data"),
    ],
)
def test_bad_options(options, said):
    result = CliRunner().invoke(app, ["vision", "tiny", *options])
    assert result.exit_code == 2 and said in " ".join(result.stderr.replace("│", " ").split())


def test_the_command(folder, tmp_path):
    Image.new("RGB", (41, 30), "red").save(folder / "c.png")
    np.save(folder / "c.npy", np.linspace(1, 9, 30 * 41).reshape(30, 41))
    written(folder, DEPTH, SEGMENT, VIEW, DEPTH | {"image": "c.png", "truth": "c.npy"})
    out = tmp_path / "out"
    options = ["--steps", "1", "--size", "32", "--depth-answers", "linear", "--batch", "3", "--out", str(out)]
    result = CliRunner().invoke(app, ["vision", "tiny", "--data", str(folder), *options])
    assert result.exit_code == 0, result.output
    assert "| view | SSIM |" in result.stdout and (out / "answers.png").exists() and (out / "report.html").exists()
    content = json.loads((out / "results.json").read_text())
    assert [row["image"] for row in content["pictures"]] == ["a.png", "a.png", "a.png", "c.png"]
    assert all(row["right, through its VAE"] for row in content["pictures"])
    assert content["settings"]["depth answers"] == "linear" and len(content["settings"]["examples"]) == 16


def test_the_lines_for_nyuv2(tmp_path, monkeypatch):
    """What the page says makes a folder that is read, with the pixels and depths where they belong."""
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(import json.*?)^```", page, re.MULTILINE | re.DOTALL)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 480, 640, 3), dtype=np.uint8)
    depths = rng.uniform(0.5, 9, (3, 480, 640)).astype(np.float32)
    depths[1, 100, 200] = 0
    stored = {"images": pictures.transpose(0, 3, 2, 1), "rawDepths": depths.transpose(0, 2, 1)}
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=lambda path, mode: stored))
    loaded = types.SimpleNamespace(loadmat=lambda path: {"testNdxs": np.array([[2], [3]])})
    monkeypatch.setitem(sys.modules, "scipy.io", loaded)
    monkeypatch.setitem(sys.modules, "scipy", types.SimpleNamespace(io=loaded))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "evaluation.md", "exec"), {})
    examples = Examples(tmp_path / "nyuv2")
    assert len(examples) == 2 and examples[0].limits == (1e-3, 10)
    assert np.array_equal(examples[0].picture, pictures[1]) and np.array_equal(examples[1].truth, depths[2])
    assert examples[0].valid.sum() == 426 * 560 - 1 and not examples[0].valid[100, 200]
