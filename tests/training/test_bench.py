"""Benchmarks from prompts to page with judges that answer what they are told to: scores by hand, and stops."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from bench_helpers import CASES, CAT, DOG, SETS, Fake, coloured, lines, picture, scores, started
from PIL import Image
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.evaluation.bench import judges
from qwen_image_fast.training.evaluation.bench.answers import AnswerFile
from qwen_image_fast.training.evaluation.bench.benchmarks import BENCHMARKS, PUBLISHED, PUBLISHED_JUDGE
from qwen_image_fast.training.evaluation.bench.cli import NAMES
from qwen_image_fast.training.evaluation.bench.run import BenchRun


def test_all_benchmarks_are_tested():
    assert tuple(BENCHMARKS) == NAMES == tuple(CASES) == tuple(SETS) and set(PUBLISHED_JUDGE) == set(NAMES)
    for name, language in PUBLISHED:
        assert language in BENCHMARKS[name].languages
    everywhere = {name: set(values) for (name, _), values in PUBLISHED.items()}
    for name, (_, expected) in CASES.items():
        # DPG's other categories and the rest of GenEval's and ImgEdit's tasks are not in the small sets.
        # CLIPScore has no judge but a CLIP: test_bench_models.py.
        found = {*expected, "CLIPScore"} if name == "cvtg" else set(expected)
        assert name in ("geneval", "geneval2", "dpg", "imgedit") or everywhere[name] <= found, name


@pytest.mark.parametrize("name", CASES)
def test_scores_by_hand(name, tmp_path):
    replies, expected = CASES[name]
    run = started(name, tmp_path)
    found, result = scores(run, Fake(replies).judge)
    assert found == pytest.approx(expected, abs=1e-9)
    assert result["senseless"] == []
    page = (run.out / "report.html").read_text(encoding="utf-8")
    assert (
        "by judge" in page
        and ("Qwen-Image" in page) is (name != "geneval2")
        and page.count("<figure>") == min(48, len(result["wrong"]))
    )


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_asked_twice(name, tmp_path):
    replies, _ = CASES[name]
    run = started(name, tmp_path)
    first = Fake(replies)
    before, _ = scores(run, first.judge)
    assert sorted(first.asked) == sorted(set(first.asked)) and first.asked
    again = Fake({})
    assert scores(run, again.judge)[0] == before and again.asked == []
    # Another judge has said nothing yet.
    other = Fake(replies, "other")
    assert scores(run, other.judge)[0] == before and sorted(other.asked) == sorted(first.asked)


def test_a_run_killed_in_the_middle_goes_on(tmp_path):
    """The file ends within a line, as a killed process leaves it."""
    run = started("dpg", tmp_path)
    replies, expected = CASES["dpg"]
    first = Fake(replies)
    run.judge(first.judge, 1)
    path = run.out / "answers.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    assert len(whole) == 16
    path.write_bytes(b"".join(whole[:5]) + whole[5][:-7])
    again = Fake(replies)
    assert scores(run, again.judge)[0] == pytest.approx(expected)
    assert sorted(again.asked) == sorted(first.asked[5:]) and len(path.read_bytes().splitlines()) == 16


def test_a_drawing_run_killed_in_the_middle_draws_the_rest_alike(tmp_path):
    run = started("geneval", tmp_path)
    before = {path.name: path.read_bytes() for path in (run.out / "pictures").iterdir()}
    assert len(before) == 8
    for name in ("00000-2.png", "00001-0.png", "00001-3.png"):
        (run.out / "pictures" / name).unlink()
    asked = []

    def draw(prompts, sources, seeds):
        asked.extend(seeds)
        return coloured(prompts, sources, seeds)

    run.draw(draw, seed=0, batch=2)
    assert asked == [2, 4, 7]
    assert {path.name: path.read_bytes() for path in (run.out / "pictures").iterdir()} == before


def test_a_picture_drawn_anew_is_asked_about_anew(tmp_path):
    run = started("dpg", tmp_path)
    replies, _ = CASES["dpg"]
    run.judge(Fake(replies).judge, 1)
    picture("white").save(run.out / "pictures/12-1.png")
    again = Fake(replies)
    run.judge(again.judge, 1)
    assert again.asked == [f"12-1.{i}" for i in (1, 2, 3, 4)]


def test_a_folder_of_another_model_is_refused(tmp_path):
    run = started("dpg", tmp_path)
    run.settings["model"] = "theirs"
    with pytest.raises(ValueError, match="was begun with model mine, got theirs; give another --out"):
        run.open()
    for path in (run.out / "pictures").iterdir():
        path.unlink()
    run.open()  # nothing of the other is there


def test_grids_are_cut_instead_of_drawn(tmp_path):
    run = started("dpg", tmp_path)
    for path in (run.out / "pictures").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"must have 12\.png, of 2 x 2 pictures"):
        run.cut(tmp_path)
    grid = Image.new("RGB", (8, 8), "red")
    grid.paste(picture("blue", (4, 4)), (4, 0))
    grid.save(tmp_path / "12.png")
    run.cut(tmp_path)
    with Image.open(run.out / "pictures/12-1.png") as image:
        assert image.size == (4, 4) and image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_another_benchmark_are_refused(name, tmp_path):
    other = "geneval" if name != "geneval" else "tiif"
    folder = SETS[other](tmp_path / "theirs")
    for path in (folder, next(p for p in sorted(folder.rglob("*")) if p.is_file()), tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"prompts of {BENCHMARKS[name].title} must be"):
            BENCHMARKS[name].load(path, "en", tmp_path / "sources")


def test_sets_of_the_other_language(tmp_path):
    for name, prompts in (("oneig", ["红狗", "牌子"]), ("gedit", ["do 3"])):
        items = BENCHMARKS[name].load(SETS[name](tmp_path / name), "zh", tmp_path / "sources")
        assert [item.prompt for item in items] == prompts
    assert items[0].source == tmp_path / "sources/k3.png" and items[0].source.exists()


def test_questions_show_source_and_result(tmp_path):
    for name in ("gedit", "imgedit"):
        run = started(name, tmp_path / name)
        question = next(iter(run.questions()))
        seen = judges.seen_by(lambda system, prompt, pictures: str([image.getpixel((0, 0)) for image in pictures]))
        assert seen(question) == str([(255, 0, 0), (5, 5, 5)])
        assert run.items[0].prompt in question.prompt


def test_a_file_of_detections_judges(tmp_path):
    run = started("geneval", tmp_path, pictures=1)
    file = lines(tmp_path / "found.jsonl", [{"picture": "00000-0", "objects": [DOG, CAT]}])
    judge = judges.find_judge(str(file), "Mask2Former", ("detections",))
    assert judge.kind == "detections" and judge.name == "Mask2Former"
    with pytest.raises(LookupError, match="has no detections of 00001-0"):
        run.judge(judge, 1)
    lines(file, [{"picture": "00000-0", "objects": [DOG, CAT]}, {"picture": "00001-0", "objects": []}])
    found, _ = scores(run, judges.find_judge(str(file), "Mask2Former", ("detections",)))
    assert found == {"two_object": 1, "counting": 0, "overall": 0.5}
    file.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1 of .* must be JSON"):
        judges.find_judge(str(file), "", ("detections",))


@pytest.mark.parametrize(
    ("given", "model", "sentence"),
    [
        ("http://x/v1", "", "--judge-model must be given"),
        ("nowhere", "", "--judge must be rapidocr, .*; there is no file or folder nowhere"),
        ("rapidocr", "", "--judge must be a chat model, got a reader"),
    ],
)
def test_judges_that_are_none(given, model, sentence):
    with pytest.raises(ValueError, match=sentence):
        judges.find_judge(given, model, ("chat",))


def test_answers_of_several_judges_share_a_file(tmp_path):
    run = started("long-text", tmp_path, pictures=1)
    question = next(iter(run.questions()))
    for name in ("one", "two"):
        run.judge(Fake({"": f"read by {name}"}, name).judge, 1)
    for name in ("one", "two"):
        file = AnswerFile(run.out / "answers.jsonl", name)
        assert file.known(question).value == f"read by {name}"
        file.close()


class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers.get("Authorization")))
        answer = json.dumps({"choices": [{"message": {"content": "yes\nno"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def interrupted(*_):
    raise KeyboardInterrupt


def test_the_command_from_a_model_to_a_page(tiny_folder, endpoint, tmp_path, monkeypatch):
    """Pictures of a model with random weights, judged by an endpoint; the second time nothing is drawn or asked."""
    monkeypatch.chdir(tmp_path)
    SETS["tiif"](tmp_path / "data")
    (tmp_path / "key").write_text("secret\n")
    arguments = ["evaluate", "bench", "tiif", str(tiny_folder), "--prompts", "data", "--out", "out", "--size", "32",
                 "--steps", "1", "--guidance", "1"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 pictures of 32 x 32 px in 1 steps with guidance 1 are to be drawn" in result.output
    next((tmp_path / "out/pictures").iterdir()).unlink()
    assert "1 pictures are there, 1 pictures of 32 x 32 px" in CliRunner().invoke(app, arguments).output
    assert "run again with --judge" in result.output and len(list((tmp_path / "out/pictures").iterdir())) == 2
    judged = ["--judge", f"http://127.0.0.1:{endpoint.server_port}/v1", "--judge-model", "oracle", "--judge-key", "key"]
    for _ in range(2):
        result = CliRunner().invoke(app, [*arguments, *judged])
        assert result.exit_code == 0, result.output
        assert "by oracle" in result.output and "| overall, short | 100 |" in result.output
        assert len(endpoint.asked) == 2
    with monkeypatch.context() as patched:
        patched.setattr(BenchRun, "judge", interrupted)
        result = CliRunner().invoke(app, [*arguments, *judged])
    assert result.exit_code == 130 and "is kept in out: the same command goes on" in result.output, result.output
    body, key = endpoint.asked[0]
    assert body["model"] == "oracle" and body["temperature"] == 0 and key == "Bearer secret"
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]).startswith(b"\x89PNG")
    assert "secret" not in "".join(p.read_text() for p in (tmp_path / "out").iterdir() if p.is_file())


def test_sizes_are_those_that_the_model_makes_best(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SETS["tiif"](tmp_path / "data")
    for name in ("own", "silent"):
        (tmp_path / name).mkdir()
        for part in tiny_folder.iterdir():
            if part.name != "generation.json":
                (tmp_path / name / part.name).symlink_to(part)
    (tmp_path / "own" / "generation.json").write_text('{"width": 48, "height": 48, "steps": 3, "cfg": 1.5}')
    drawing = "qwen_image_fast.training.evaluation.bench.drawing.drawn_by"
    monkeypatch.setattr(drawing, lambda *args, **sampling: interrupted())
    for model, options, said in [
        ("own", [], "48 x 48 px in 3 steps with guidance 1.5"),
        ("own", ["--size", "32", "--guidance", "0"], "32 x 32 px in 3 steps with guidance 0"),
        ("silent", [], "1024 x 1024 px in 50 steps with guidance 4"),
    ]:
        arguments = ["evaluate", "bench", "tiif", model, "--prompts", "data", "--out", f"out{len(said)}", *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 130 and f"2 pictures of {said} are to be drawn" in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["frob", "tiny", "--prompts", "data"], "the benchmark must be one of geneval"),
        (["dpg", "tiny", "--prompts", "data"], "--prompts of DPG-Bench must be a CSV file with the columns"),
        (["dpg", "tiny", "--prompts", "data"], "there is no data/dpg_bench.csv"),
        (["dpg", "tiny", "--prompts", "dat"], "names; there is no dat; did you mean data?"),
        (["tiif", "tiny", "--prompts", "data", "--size", "33"], "--size must be a multiple of 16 pixels, got 33; 32"),
        (["tiif", "tiny", "--prompts", "data", "--judge", "dat"], "there is no file or folder dat; did you mean data?"),
        (["tiif", "tiny", "--prompts", "data", "--judge-model", "x"], "--judge-model must come with --judge, who"),
        (["tiif", "tiny", "--prompts", "data", "--language", "zh"], "--language must be en for tiif, got zh"),
        (
            ["tiif", "tiny", "--prompts", "data", "--judge", "rapidocr"],
            "--judge must be a chat model, got a reader of texts",
        ),
        (["tiif", "tinny", "--prompts", "data"], "tinny"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SETS["tiif"](tmp_path / "data")
    result = CliRunner().invoke(app, ["evaluate", "bench", *arguments])
    assert result.exit_code != 0 and sentence in " ".join(result.output.split()), result.output
    assert not list(tmp_path.glob("outputs/*/pictures/*"))
