"""Quantised files in a server: the pictures of `generate`, and schedules that a file does not have."""

import base64
import io
import threading

import numpy as np
import openai
import pytest
from http_harness import Running
from PIL import Image
from serving_harness import picture, png
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.cli.progress import Progress
from qwen_image_fast.png_metadata import read_parameters
from qwen_image_fast.request_schedule import StoredLevels
from qwen_image_fast.serving.loading import load
from qwen_image_fast.serving.messages import Alive, Ready
from qwen_image_fast.serving.settings import Model

PROMPT = "a red circle on the left of a blue square"
FILE = "diffusion_pytorch_model.safetensors"
OWN = ["--drop-modulation", "--steps", 3, "--size", "64x64", "--size", "96x64"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of `quantize`: int8 without modulation weights, and int4 with them."""
    found = tmp_path_factory.mktemp("quantised")
    run("quantize", "tiny", "--out", found / "int8", "--no-check", *OWN)
    run("quantize", "tiny", "--out", found / "fast", "--no-check", "--drop-modulation", "--lightning", 4)
    run("quantize", "tiny", "--out", found / "int4", "--no-check", "--precision", "int4")
    return found


class Loaded:
    """What stands for the engine's process: the model read by the same code, in this one."""

    def __init__(self, model, on_event, on_end):
        self.engine, about = load(model, on_event)
        self.submit, self.cancel = self.engine.submit, self.engine.cancel
        on_event(Ready(about))
        self.ended = threading.Event()
        threading.Thread(target=self.live, args=(on_event,), daemon=True).start()

    def live(self, on_event):
        while not self.ended.wait(1):
            on_event(Alive({"host": 1}, *self.engine.load, self.engine.rate))

    def end(self):
        self.ended.set()
        self.engine.end()


@pytest.fixture(scope="module", params=["int8", "int4"])
def served(request, folder):
    model = {"transformer": str(folder / request.param / FILE), "precision": request.param, "dtype": "bfloat16"}
    server = Running(None, start=Loaded, model=model)
    yield server
    server.end()


def drawn(server, **more):
    body = {"num_inference_steps": 3, "seed": 5, **more.pop("extra", {})}
    answer = server.client().images.generate(prompt=PROMPT, **{"size": "64x64", **more}, extra_body=body)
    return [base64.b64decode(one.b64_json) for one in answer.data]


def pixels(file):
    return np.asarray(Image.open(file))


def test_the_picture_is_that_of_generate(served, folder, tmp_path):
    precision = served.settings.model.precision
    for size, count in (("64x64", 2), ("96x64", 1)):
        found = drawn(served, size=size, n=count)
        run("generate", PROMPT, "--model", "tiny", "--transformer", folder / precision / FILE, "--seed", 5,
            "--precision", precision, "--steps", 3, "--size", size, "--images", count,
            "--output", f"{tmp_path}/{size}/")  # fmt: skip
        wanted = sorted((tmp_path / size).iterdir())
        assert len(found) == len(wanted) == count
        for k, (png_bytes, path) in enumerate(zip(found, wanted)):
            (tmp_path / f"{k}.png").write_bytes(png_bytes)
            assert (pixels(tmp_path / f"{k}.png") == pixels(path)).all()
            assert read_parameters(tmp_path / f"{k}.png")["precision"] == precision


def test_another_schedule(served):
    """Refused by name where its vectors are not there, alone or among others, and the server goes on."""
    before = drawn(served)
    lines = ("3 steps of 64x64, 96x64", "not for 4 steps of 64x64: take such a schedule, or make a file for this one")
    fast = {"num_inference_steps": None, "lightning": 4}
    ways = [{"extra": {"num_inference_steps": 4}}, {"size": "512x512"}, {"extra": fast}]
    if served.settings.model.precision == "int4":
        for more in ways:
            assert len(drawn(served, **more)) == 1
        return
    for k, more in enumerate(ways):
        with pytest.raises(openai.BadRequestError) as refused:
            drawn(served, **more)
        error = refused.value.body
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
        assert "the modulation weights were left out of this transformer" in error["message"]
        assert k or all(line in error["message"] for line in lines)
    edit = {"prompt": "make it green", "size": "auto", "num_inference_steps": "7", "seed": "1"}
    answer = served.http.post("/v1/images/edits", data=edit, files={"image": png(picture(64, 64))})
    assert answer.status_code == 400 and "not for 7 steps of 64x64" in answer.json()["error"]["message"]
    streamed = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 9, "stream": True}
    with served.http.stream("POST", "/v1/images/generations", json=streamed) as stream:
        assert "not for 9 steps of 64x64" in "".join(stream.iter_text())
    assert served.http.get("/readyz").status_code == 200
    assert drawn(served) == before and served.server.desk.about["precision"] == "int8"


def test_what_is_usual_is_stored(served):
    """A request that says nothing of its schedule, and what the page offers, have one that is there."""
    about = served.http.get("/v1/models").json()["about"]
    usual = {name: about["defaults"][name] for name in ("steps", "width", "height")}
    if served.settings.model.precision == "int4":
        assert about["schedules"] == [] and usual == {"steps": 20, "width": 128, "height": 128}
        return
    assert about["schedules"] == [{"steps": 3, "width": w, "height": 64} for w in (64, 96)]
    assert usual == {"steps": 3, "width": 96, "height": 64}  # the nearest to tiny's
    body = {"prompt": PROMPT, "seed": 1}
    answer = served.http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).size == (96, 64)


def test_where_lightning_alone_is_stored_it_is_usual(folder):
    model = {"transformer": str(folder / "fast" / FILE), "precision": "int8", "dtype": "bfloat16"}
    server = Running(None, start=Loaded, model=model)
    assert server.http.get("/v1/models").json()["about"]["schedules"] == [{"steps": 4, "lightning": 4}]
    for more, status in (
        ({}, 200),
        ({"size": "96x64"}, 200),
        ({"lightning": 4}, 200),
        ({"num_inference_steps": 4}, 400),
    ):
        body = {"prompt": PROMPT, "seed": 1, "size": "64x64", **more}
        assert server.http.post("/v1/images/generations", json=body).status_code == status, more
    server.end()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--precision", "int3"], "--precision must be int8 or int4, got int3"),
        (["--precision", "int4"], "is quantised already"),
        (
            ["--dtype", "float32"],
            "the transformer's dtype must be bfloat16, in which its modulation vectors are stored",
        ),
    ],
)
def test_what_cannot_be_served(folder, words, sentence, monkeypatch):
    monkeypatch.setattr("qwen_image_fast.serving.run.run", None)
    monkeypatch.setattr("qwen_image_fast.serving.logs.to_stderr", None)
    file = folder / "int8" / FILE
    result = CliRunner().invoke(app, ["serve", "--model", "tiny", "--port", "0", "--transformer", str(file), *words])
    assert result.exit_code == 2 and sentence in result.stderr and "Traceback" not in result.stderr


def test_a_file_of_which_no_schedule_can_be_asked_for(folder, monkeypatch):
    monkeypatch.setattr(StoredLevels, "offered", lambda self: [])
    words = ["--model", "tiny", "--port", "0", "--transformer", str(folder / "int8" / FILE), "--precision", "int8"]
    result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code == 2 and "no schedule that can be asked for is stored in it" in result.stderr


@pytest.mark.parametrize("precision", [None, "int8"])
def test_what_is_ready_says_its_precision(precision, monkeypatch):
    """On a terminal in its line, elsewhere in the log (`loading.load`)."""
    monkeypatch.setattr("qwen_image_fast.serving.run.run", lambda settings, sockets, on_ready, on_end: on_ready())
    monkeypatch.setattr("qwen_image_fast.serving.logs.to_stderr", lambda **_: None)
    monkeypatch.setattr("qwen_image_fast.cli.serve.Progress", lambda _: Progress(True))
    given = [] if precision is None else ["--precision", precision]
    result = run("serve", "--model", "tiny", "--port", "0", "--device", "cpu", *given)
    wanted = "ready in float32: a page" if precision is None else "ready in bfloat16, large layers in int8: a page"
    assert wanted in result.stderr.splitlines()[-1]


def test_the_command_passes_it_on(folder, monkeypatch):
    found = {}
    monkeypatch.setattr("qwen_image_fast.serving.run.run", lambda settings, *_: found.update(model=settings.model))
    monkeypatch.setattr("qwen_image_fast.serving.logs.to_stderr", lambda **_: None)
    file = folder / "int4" / FILE
    run("serve", "--model", "tiny", "--port", "0", "--transformer", file, "--precision", "int4", "--device", "cpu")
    wanted = {"precision": "int4", "dtype": "bfloat16", "transformer": str(file)}
    assert isinstance(found["model"], Model) and found["model"].model_dump(include=wanted.keys()) == wanted
