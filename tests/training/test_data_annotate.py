"""Annotation against a stub of an OpenAI-compatible endpoint that is slow, broken, rude and talks nonsense."""

import base64
import collections
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
from data_pictures import encoded, noise, photos
from PIL import Image
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.data import annotate as module
from qwen_image_fast.training.data.collect import collect
from qwen_image_fast.training.data.recipe import AnnotateRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards

GOOD = {
    "caption": 'A cup beside a sign that says "你好".', "image_type": "photograph", "image_style": "realistic",
    "watermarks": [], "abnormal_element": False, "texts": ["你好"],
}  # fmt: skip
WHOLE = json.dumps(GOOD, ensure_ascii=False)


class Stub(ThreadingHTTPServer):
    """Answers with `reply(handler, times)`; times: how often this picture was asked about, 1 for the first."""

    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.asked, self.lock = reply, collections.Counter(), threading.Lock()
        self.now = self.most = 0
        self.bodies = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that give up close their connection


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        shown = body["messages"][1]["content"][0]["image_url"]["url"].partition(",")[2]
        key = hashlib.sha256(base64.b64decode(shown)).hexdigest()
        with server.lock:
            server.bodies.append(body)
            server.asked[key] += 1
            times = server.asked[key]
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            server.reply(self, times)
        finally:
            with server.lock:
                server.now -= 1

    def say(self, text, status=200, headers=()):
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Stub(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def recipe_of(folder, server, count=6, **changes):
    write_shards([Record(noise(n), {"raw": f"picture {n}"}, origin=f"{n}") for n in range(count)], folder)
    url = server if isinstance(server, str) else server.url
    fast = {"backoff": 0.01, "timeout": 5.0, "parallel": 3, **changes}
    return AnnotateRecipe(sources=[SourceRecipe(str(folder))], endpoint=url, model="stub", **fast)


def audit_of(out):
    return pq.read_table(out / "audit.parquet").to_pylist()


def test_records_get_caption_and_metadata_and_requests_are_bounded(tmp_path, serve):
    def reply(handler, times):
        time.sleep(0.02)
        handler.say(WHOLE)

    server = serve(reply)
    recipe = recipe_of(tmp_path / "in", server, 12)
    write_shards([Record(noise(0), origin="again")], tmp_path / "more")
    recipe.sources.append(SourceRecipe(str(tmp_path / "more")))
    result = module.annotate(recipe, tmp_path / "out")
    assert (result.seen, result.annotated, result.repaired, result.rejected) == (13, 13, 0, {})
    assert set(server.asked.values()) == {1} and len(server.asked) == 12  # the repeated picture once
    assert 2 <= server.most <= 3
    records = list(collect(tmp_path / "out" / "shards"))
    assert [r.image for r in records] == [noise(n) for n in [*range(12), 0]]
    assert records[3].captions == {"raw": "picture 3", "recaption": GOOD["caption"]}
    assert records[3].metadata["annotation"] == {k: v for k, v in GOOD.items() if k != "caption"}
    # The same again asks nobody.
    module.annotate(recipe, tmp_path / "out")
    assert sum(server.asked.values()) == 12
    recipe.model = "another"
    with pytest.raises(ValueError, match="was begun with another model"):
        module.annotate(recipe, tmp_path / "out")


def once(trouble):
    """A reply with trouble the first time that a picture is asked about."""
    return lambda handler, times: trouble(handler) if times == 1 else handler.say(WHOLE)


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize(
    "trouble",
    [
        lambda handler: time.sleep(0.6), trickle, lambda handler: handler.say(WHOLE, 503),
        lambda handler: handler.say("", 429, [("Retry-After", "0")]), lambda handler: handler.connection.close(),
        lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nnot a completion"),
        lambda handler: handler.say("I'm sorry, I cannot help with that."),
        lambda handler: handler.say(WHOLE[: len(WHOLE) // 2]), lambda handler: handler.say(None),
    ],
    ids=["timeout", "trickle", "503", "429", "closed", "no completion", "refusal", "half", "empty"],
)  # fmt: skip
def test_trouble_is_tried_again(tmp_path, serve, trouble):
    recipe = recipe_of(tmp_path / "in", serve(once(trouble)), 2, timeout=0.3)
    result = module.annotate(recipe, tmp_path / "out")
    assert result.annotated == 2 and [row["attempts"] for row in audit_of(tmp_path / "out")] == [2, 2]


def test_every_fate_is_in_the_audit(tmp_path, serve):
    server = serve(lambda handler, times: handler.say("la la la"))
    recipe = recipe_of(tmp_path / "in", server, 2, attempts=2)
    (tmp_path / "broken").mkdir()
    for name, content in (("cut.png", noise(7)[:500]), ("empty.jpg", b""), ("words.png", b"<html>" * 50)):
        (tmp_path / "broken" / name).write_bytes(content)
    recipe.sources.append(SourceRecipe(str(tmp_path / "broken")))
    result = module.annotate(recipe, tmp_path / "out")
    rows = audit_of(tmp_path / "out")
    assert (result.seen, result.annotated) == (5, 0) and not any(row["annotated"] for row in rows)
    assert [row["reason"] for row in rows[:2]] == ["the answer has no JSON object: 'la la la'"] * 2
    assert "cannot be decoded" in rows[2]["reason"] and rows[3]["reason"] == "the file is empty"
    assert sum(result.rejected.values()) == 5 and sum(server.asked.values()) == 4


def raw(content):
    """A reply of status 200 with some bytes."""

    def reply(handler, times):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


@pytest.mark.parametrize(
    "reply",
    [raw(b"<html><h1>502 Bad Gateway</h1></html>"), raw(b'{"choices": []}'), raw(b"\xff\x00garbage"),
     lambda handler, times: handler.say("no JSON at all"), lambda handler, times: handler.say("", 400)],
    ids=["html", "no choices", "garbage", "no annotation", "400"],
)  # fmt: skip
def test_answers_of_no_use_end_the_run_and_are_asked_for_again(tmp_path, serve, reply):
    server = serve(reply)
    recipe = recipe_of(tmp_path / "in", server, 9, parallel=1, attempts=1, give_up_after=3)
    with pytest.raises(RuntimeError, match="the endpoint failed for 3 pictures in a row: .*run the same"):
        module.annotate(recipe, tmp_path / "out")
    assert sum(server.asked.values()) == 3
    server.reply = lambda handler, times: handler.say(WHOLE)
    assert module.annotate(recipe, tmp_path / "out").annotated == 9


def test_some_without_an_answer_are_said_by_the_exit_code(tmp_path, serve):
    lock, first = threading.Lock(), []

    def one_is_sick(handler, times):
        with lock:
            first.append(1)
            ill = len(first) == 1
        raw(b"<html>")(handler, times) if ill else handler.say(WHOLE)

    server = serve(one_is_sick)
    recipe_of(tmp_path / "in", server, 4)
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(f"sources: [{{path: {tmp_path / 'in'}}}]\nendpoint: {server.url}\nmodel: stub\nattempts: 1\n")
    command = ["data", "annotate", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    text = " ".join(result.output.split())
    assert result.exit_code == 1 and "3 of 4 annotated" in text and "the endpoint failed for 1 of 4 pictures" in text
    assert len(list(collect(out / "shards"))) == 3
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "4 of 4 annotated" in result.output and sum(server.asked.values()) == 5


def test_question_language_trigger_and_captions_beside_the_pictures(tmp_path, serve):
    server = serve(lambda handler, times: handler.say(WHOLE))
    asked = server.bodies
    photo = Image.fromarray(photos()["coffee.png"])
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "in" / "deep").mkdir(parents=True)
    files = {
        "small.jpg": encoded(photo.resize((60, 40)), "JPEG"), "deep/large.jpg": encoded(photo, "JPEG"),
        "turned.jpg": encoded(photo.resize((60, 40)), "JPEG", exif=turned), "has.png": noise(1),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "has.txt").write_text("a caption of mine")
    recipe = AnnotateRecipe(
        sources=[SourceRecipe(str(tmp_path / "in"))], endpoint=server.url, model="stub", max_side=64,
        question="one short sentence about the clothes", language="Chinese", trigger="sks dog,", beside=True,
    )  # fmt: skip
    result = module.annotate(recipe, tmp_path / "out")
    assert (result.annotated, result.beside, result.had_caption) == (4, 3, 1)
    assert (tmp_path / "in" / "deep" / "large.txt").read_text() == f"sks dog, {GOOD['caption']}"
    assert (tmp_path / "in" / "has.txt").read_text() == "a caption of mine"
    assert {r.captions["recaption"] for r in collect(tmp_path / "out" / "shards")} == {f"sks dog, {GOOD['caption']}"}
    content = {body["messages"][1]["content"][1]["text"].partition('"image_type"')[0] for body in asked}
    assert len(content) == 1 and '"caption": in Chinese, one short sentence about the clothes' in content.pop()
    shown = {body["messages"][1]["content"][0]["image_url"]["url"] for body in asked}
    as_it_is = "data:image/jpeg;base64," + base64.b64encode(files["small.jpg"]).decode()
    assert as_it_is in shown and sum(url.startswith("data:image/png") for url in shown) == 3
    # The next run finds its own captions.
    assert module.annotate(recipe, tmp_path / "out").had_caption == 1 and len(asked) == 4
    recipe.sources = [SourceRecipe(str(tmp_path / "out" / "shards"))]
    with pytest.raises(ValueError, match="with `beside`, the sources must be folders of pictures"):
        module.annotate(recipe, tmp_path / "other")


def test_a_pilot_comes_before_the_rest(tmp_path, serve):
    server = serve(lambda handler, times: handler.say(WHOLE.replace("A cup", "A <b>cup</b>")))
    recipe_of(tmp_path / "in", server, 6)
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(f"sources: [{{path: {tmp_path / 'in'}}}]\nendpoint: {server.url}\nmodel: stub\n")
    command = ["data", "annotate", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--pilot", "2"], catch_exceptions=False)
    assert result.exit_code == 0 and "2 of 2 annotated" in result.output and sum(server.asked.values()) == 2
    page = (out / "pilot.html").read_text()
    assert page.count("data:image/jpeg") == 2 and "A &lt;b&gt;cup&lt;/b&gt;" in page and "2 of 2 annotated" in page
    assert not (out / "audit.parquet").exists()
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert sum(server.asked.values()) == 6 and len(list(collect(out / "shards"))) == 6


def test_a_dead_endpoint_stops_the_run_which_goes_on_later(tmp_path, serve):
    sick = threading.Event()

    def reply(handler, times):
        handler.say(WHOLE, 500 if sick.is_set() else 200)

    server = serve(reply)
    recipe = recipe_of(tmp_path / "in", server, 9, parallel=1, attempts=2, give_up_after=3)
    seen = []

    def progress():
        seen.append(1)
        if len(seen) == 4:
            sick.set()

    with pytest.raises(RuntimeError, match="failed for 3 pictures in a row: endpoint: .* HTTP Error 500.*run the same"):
        module.annotate(recipe, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out" / "audit.parquet").exists()
    sick.clear()
    before = sum(server.asked.values())
    assert module.annotate(recipe, tmp_path / "out").annotated == 9
    assert sum(server.asked.values()) - before == 5  # four were done


@pytest.mark.parametrize("status, stops", [(401, True), (404, True), (400, False)])
def test_refusals_are_not_tried_again(tmp_path, serve, status, stops):
    server = serve(lambda handler, times: handler.say("", status))
    recipe = recipe_of(tmp_path / "in", server, 1)
    if stops:
        with pytest.raises(RuntimeError, match=f"HTTP Error {status}.*check endpoint, model and api_key_file"):
            module.annotate(recipe, tmp_path / "out")
    else:
        assert f"HTTP Error {status}" in next(iter(module.annotate(recipe, tmp_path / "out").rejected), "") or (
            f"HTTP Error {status}" in audit_of(tmp_path / "out")[0]["reason"]
        )
    assert sum(server.asked.values()) == 1


def test_killed_in_the_middle_it_goes_on(tmp_path, serve):
    def reply(handler, times):
        time.sleep(0.05)
        handler.say(WHOLE)

    server = serve(reply)
    recipe_of(tmp_path / "in", server, 40)
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(f"sources: [{{path: {tmp_path / 'in'}}}]\nendpoint: {server.url}\nmodel: stub\nparallel: 2\n")
    command = ["data", "annotate", str(file), "--out", str(out)]
    run = subprocess.Popen([sys.executable, "-m", "qwen_image_fast.cli", *command], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 600  # it starts slowly on a busy machine
    while sum(server.asked.values()) < 8 and run.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    killed_at = sum(server.asked.values())
    assert 8 <= killed_at < 40 and not (out / "audit.parquet").exists()
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "40 of 40 annotated" in result.output
    # Only what was under way at the kill, at most `parallel`, was asked about again.
    assert sum(count - 1 for count in server.asked.values()) <= 2 and len(server.asked) == 40
    assert len(list(collect(out / "shards"))) == 40


def test_a_full_disk_loses_nothing(tmp_path, serve, monkeypatch):
    server = serve(lambda handler, times: handler.say(WHOLE))
    recipe = recipe_of(tmp_path / "in", server, 3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shards", full)
        with pytest.raises(OSError, match="the disk is full: .*audit.parquet could not be written"):
            module.annotate(recipe, tmp_path / "out")
    assert module.annotate(recipe, tmp_path / "out").annotated == 3 and sum(server.asked.values()) == 3
