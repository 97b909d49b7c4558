"""Benchmarks from prompts to page with judges that answer what they are told to: scores by hand, stops, nonsense."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from bench_helpers import SETS, coloured, lines, picture, started
from PIL import Image
from typer.testing import CliRunner

from qwen_image_fast.chat import EndpointError, NoCompletion, NoText
from qwen_image_fast.cli import app
from qwen_image_fast.training.evaluation.bench import judges
from qwen_image_fast.training.evaluation.bench.answers import AnswerFile, JudgeDown
from qwen_image_fast.training.evaluation.bench.benchmarks import BENCHMARKS, PUBLISHED, PUBLISHED_JUDGE
from qwen_image_fast.training.evaluation.bench.cli import NAMES
from qwen_image_fast.training.evaluation.bench.judges import Judge

DOG, CUP = {"class": "dog", "score": 0.99, "box": [0, 0, 9, 9]}, {"class": "cup", "score": 0.99, "box": [0, 0, 9, 9]}
CAT = {**DOG, "class": "cat"}


class Fake:
    """A judge that answers by the first of `replies` whose key the question's key or words contain, and counts."""

    def __init__(self, replies, name="judge"):
        self.replies, self.asked, self.lock = replies, [], threading.Lock()
        self.judge = Judge(name, "chat", self.answer)

    def answer(self, question):
        with self.lock:
            self.asked.append(question.key)
        for key, reply in self.replies.items():
            if key in question.key or key in question.prompt:
                if isinstance(reply, Exception):
                    raise reply
                return reply
        raise AssertionError(question)


def scores(run, judge, **options):
    answers = run.judge(judge, 2, **options)
    run.score(judge.name, answers)
    result = json.loads((run.out / "results.json").read_text())
    assert result["judge"] == judge.name and all(s["judge"] == judge.name for s in result["scores"])
    return {s["name"]: s["value"] for s in result["scores"]}, result


# Benchmark → what the judge answers, and what is scored, by hand.
CASES = {
    # Of four pictures of each prompt one has both animals, none has two cups.
    "geneval": ({"00000-0": json.dumps([DOG, CAT]), "00000": json.dumps([DOG]), "00001": json.dumps([CUP] * 3)},
                {"two_object": 0.25, "counting": 0.0, "overall": 0.125}),
    # Three of four right: 3/4, and the root of a product with a zero.
    "geneval2": ({"How many": "4", "white": "yes", "bicycles?": "no", "cars": "No."},
                 {"count": 1, "attribute": 1, "object": 0.5, "atoms (arithmetic mean)": 0.75,
                  "prompts (geometric mean)": 0}),
    # Dog yes, red no, so left counts as no although it was yes; drawing yes: 2 of 4. Categories before that.
    "dpg": ({"there a dog": "yes", "dog red": "no", "dog left": "yes", "drawing": "Yes"},
            {"entity": 100, "attribute": 0, "relation": 100, "global": 100, "overall": 50}),
    # Alignment: dog no, so red no. Text: "big SALE" without its last word of five letters and a space.
    "oneig": ({"A dog?": "no", "Red?": "yes", "text-001": "big SALE"},
              {"alignment": 0, "text": 1 - 6 * 1 * (1 / 3) / 100}),
    # Short: one of two right; long: both.
    "tiif": ({"short": "yes\nyes", "long": "1. yes\n2. no"},
             {"color, short": 50, "color, long": 100, "overall, short": 50, "overall, long": 100}),
    # Every picture says "WORD0 word1": two words of two, three, four and five. NED: 1 for those; for a word without its
    # like the nearest, one letter of five away.
    "cvtg": ({"": "WORD0\nword1"},
             {"word accuracy, 2 regions": 1, "word accuracy, 3 regions": 2 / 3, "word accuracy, 4 regions": 0.5,
              "word accuracy, 5 regions": 0.4, "word accuracy": 8 / 14,
              "NED": (16 + 12 * (1 - 1 / 5.00001)) / 28}),
    # One of three, one of one, none of one: two of five.
    "chinese-word": ({"L1-04e00": "一", "L1": "未", "L2": "丁", "L3": "NONE"},
                     {"level 1": 100 / 3, "level 2": 100, "level 3": 0, "overall": 40}),
    # "to be or" of "to be or not to be".
    "long-text": ({"": "To be, or"}, {"signs": 0.5, "overall": 0.5}),
    # k0: least 4 and 9, root 6; k1: 0; k2: 8 and 8. Means over groups: SC (2 + 8) / 2, PQ (9 + 8) / 2, O (3 + 8) / 2.
    "gedit": ({"k0-0.success": '{"score": [4, 9]}', "k1-0.success": '{"score": [0, 9]}',
               "k2-0.success": '{"score": [8, 9]}', "k2-0.quality": '{"score": [8, 8]}',
               "quality": '{"score": [9, 10]}'},
              {"color_alter": 3, "text_change": 8, "SC": 5, "PQ": 8.5, "overall": 5.5}),
    # 4 for the hat; 2 for the dog.
    "imgedit": ({"1-0": "First: 5\nSecond: 4\nThird: 3", "2-0": "First: 2\nSecond: 2\nThird: 2"},
                {"Add": 4, "Remove": 2, "overall": 3}),
}  # fmt: skip


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


def test_nonsense_is_asked_for_again_then_counted_and_said(tmp_path):
    run = started("dpg", tmp_path, pictures=1)
    fake = Fake({**CASES["dpg"][0], "there a dog": "perhaps"})
    found, result = scores(run, fake.judge)
    assert fake.asked.count("12-0.1") == 3 and result["senseless"] == ["12-0.1"]
    assert found["entity"] == 0 and found["overall"] == 25  # all that hangs on the dog is no
    assert "1 of 4 answers made no sense" in (run.out / "report.html").read_text()
    again = Fake({})
    assert scores(run, again.judge)[1]["senseless"] == ["12-0.1"] and again.asked == []


def test_a_judge_that_makes_no_sense_at_all_is_no_judge(tmp_path):
    """Nothing of it counts or is kept; a proxy that answers with a page of its own is the same."""
    run = started("dpg", tmp_path)
    replies, expected = CASES["dpg"]
    page = "judge: http://x must answer with a chat completion"
    for reply in ("Let me think", NoCompletion(page), NoText("judge: the answer must be a text, got ''")):
        with pytest.raises(JudgeDown, match="made no sense 10 times in a row, the last time by"):
            run.judge(Fake({"": reply}).judge, 2)
        assert (run.out / "answers.jsonl").read_text() == ""
    again = Fake(replies)
    assert scores(run, again.judge)[0] == pytest.approx(expected) and len(again.asked) == 16


def test_few_questions_without_any_sense_are_no_score(tmp_path):
    """Fewer than ten in a row; the judge is asked anew once it is repaired."""
    run = started("dpg", tmp_path, pictures=1)
    with pytest.raises(JudgeDown, match="made no sense whatever it was asked, the last time by 'bananas'"):
        run.judge(Fake({"": "bananas"}).judge, 2)
    assert (run.out / "answers.jsonl").read_text() == ""
    again = Fake(CASES["dpg"][0])
    assert scores(run, again.judge)[1]["senseless"] == [] and len(again.asked) == 4


def test_sense_at_the_third_time_is_sense(tmp_path):
    run = started("dpg", tmp_path, pictures=1)
    said = iter(["", "hm", "yes"])

    def ask(question):
        return next(said) if question.key == "12-0.1" else "yes"

    found, result = scores(run, Judge("judge", "chat", ask))
    assert found["overall"] == 100 and result["senseless"] == []


@pytest.mark.parametrize("status", [None, 500, 401])
def test_a_judge_that_is_down_stops_the_run_and_nothing_is_lost(status, tmp_path):
    run = started("dpg", tmp_path)
    replies, expected = CASES["dpg"]
    down = Fake({"12-2.3": EndpointError("judge: the line is cut", status), **replies})
    with pytest.raises(JudgeDown, match="the judge does not answer: judge: the line is cut; what it has said is kept"):
        run.judge(down.judge, 1, pause=0.0)
    assert down.asked.count("12-2.3") == (1 if status == 401 else 3)
    assert not (run.out / "results.json").exists()
    kept = len((run.out / "answers.jsonl").read_text().splitlines())
    assert kept >= 10
    again = Fake(replies)
    assert scores(run, again.judge)[0] == pytest.approx(expected)
    assert len(again.asked) == 16 - kept and "12-2.3" in again.asked


def test_a_judge_that_fails_is_not_one_that_makes_no_sense(tmp_path):
    """A ValueError of its own, such as a detector's at a picture that it cannot prepare."""
    run = started("dpg", tmp_path)
    replies, expected = CASES["dpg"]
    fails = Fake({"12-2.3": ValueError("mean must have 3 elements"), **replies})
    with pytest.raises(JudgeDown, match=r"failed at 12-2.3, .*12-2\.png: mean must have 3 elements; what it has said"):
        run.judge(fails.judge, 1)
    assert fails.asked.count("12-2.3") == 1 and not (run.out / "results.json").exists()
    again = Fake(replies)
    assert scores(run, again.judge)[0] == pytest.approx(expected) and 0 < len(again.asked) < 16


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


def test_the_command_from_a_model_to_a_page(tiny_folder, endpoint, tmp_path, monkeypatch):
    """Pictures of a model with random weights, judged by an endpoint; the second time nothing is drawn or asked."""
    monkeypatch.chdir(tmp_path)
    SETS["tiif"](tmp_path / "data")
    (tmp_path / "key").write_text("secret\n")
    arguments = ["evaluate", "bench", "tiif", str(tiny_folder), "--prompts", "data", "--out", "out", "--size", "32",
                 "--steps", "1", "--guidance", "1"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "run again with --judge" in result.output and len(list((tmp_path / "out/pictures").iterdir())) == 2
    judged = ["--judge", f"http://127.0.0.1:{endpoint.server_port}/v1", "--judge-model", "oracle", "--judge-key", "key"]
    for _ in range(2):
        result = CliRunner().invoke(app, [*arguments, *judged])
        assert result.exit_code == 0, result.output
        assert "by oracle" in result.output and "| overall, short | 100 |" in result.output
        assert len(endpoint.asked) == 2
    body, key = endpoint.asked[0]
    assert body["model"] == "oracle" and body["temperature"] == 0 and key == "Bearer secret"
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]).startswith(b"\x89PNG")
    assert "secret" not in "".join(p.read_text() for p in (tmp_path / "out").iterdir() if p.is_file())


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
