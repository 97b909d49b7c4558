"""The images API by OpenAI's own client: what it sends is understood, what it gets it can read."""

import base64
import io
import json
import re
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from http_harness import Inside, Running
from PIL import Image
from serving_harness import alone, picture, png, task

from qwen_image_fast.png_metadata import read_parameters, read_request

PROMPT = "a red circle on the left of a blue square"
QUICK = {"num_inference_steps": 3, "seed": 7}


def opened(entry):
    image = Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))
    image.load()
    return image


def test_a_picture_is_that_of_the_pipeline(running, models, tmp_path):
    answer = running.client().images.generate(prompt=PROMPT, model="tiny", size="64x64", n=2, extra_body=QUICK)
    expected = alone(models, task(PROMPT, 64, steps=3, seed=7, images=2))
    assert [np.array_equal(opened(e), x) for e, x in zip(answer.data, expected)] == [True, True]
    assert (answer.size, answer.output_format, answer.background, answer.quality) == ("64x64", "png", "opaque", "high")
    assert [entry.seed for entry in answer.data] == [7, 8]
    assert answer.usage.output_tokens == 32 and answer.usage.input_tokens_details.text_tokens > 5
    file = tmp_path / "x.png"
    file.write_bytes(base64.b64decode(answer.data[1].b64_json))
    request, _, unknown = read_request(file)
    assert (request.prompt, request.seed, request.steps, request.width, unknown) == (PROMPT, 8, 3, 64, [])


@pytest.mark.parametrize("kind, quality", [("jpeg", 80), ("webp", None)])
def test_formats_and_qualities(running, kind, quality):
    answer = running.client().images.generate(
        prompt=PROMPT, size="64x48", output_format=kind, output_compression=quality, quality="low", user="me",
        background="opaque", moderation="low", extra_body={"seed": 1},
    )  # fmt: skip
    image = opened(answer.data[0])
    assert image.format == kind.upper() and image.size == (64, 48)
    assert answer.quality == "low" and answer.output_format == kind


def test_ratios_extensions_and_what_is_usual(running):
    body = {"true_cfg_scale": 2.0, "negative_prompt": "blue", "lora": [{"name": "style", "scale": 0.5}], **QUICK}
    answer = running.client().images.generate(prompt=PROMPT, size="16:9", extra_body=body)
    assert answer.size == "176x96"
    assert running.client().images.generate(prompt=PROMPT, extra_body=QUICK).size == "128x128"


@pytest.mark.parametrize("count", [1, 3])
def test_edits_with_files(running, models, count):
    images = [picture(64 + 16 * k, 48, k) for k in range(count)]
    files = [(f"{k}.png", png(image), "image/png") for k, image in enumerate(images)]
    answer = running.client().images.edit(
        image=files[0] if count == 1 else files, prompt="make the circle green", extra_body=QUICK
    )
    t = task("make the circle green", kind="edit", opened={"image": images}, steps=3, seed=7)
    assert np.array_equal(opened(answer.data[0]), alone(models, t)[0])
    assert answer.usage.input_tokens_details.image_tokens == sum(3 * (4 + k) for k in range(count))


def test_edits_inside_a_mask(running):
    image = picture(64, 64)
    mask = Image.new("RGBA", image.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 32))
    answer = running.client().images.edit(image=("a.png", png(image)), mask=("m.png", png(mask)), prompt=PROMPT,
                                          extra_body=QUICK)  # fmt: skip
    made, before = (np.asarray(x).astype(int) for x in (opened(answer.data[0]), image))
    assert np.abs(made - before)[48:].mean() < np.abs(made - before)[:24].mean()


def test_edits_in_json(running, models):
    image = picture(64, 64)
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    body = {"images": [{"image_url": url}], "prompt": "make it green", **QUICK}
    answer = running.http.post("/v1/images/edits", json=body).json()
    t = task("make it green", kind="edit", opened={"image": [image]}, steps=3, seed=7)
    found = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert np.array_equal(found, alone(models, t)[0])


def test_variations(running):
    answer = running.client().images.create_variation(image=("a.png", png(picture(64, 64))), n=2, size="64x64",
                                                      extra_body=QUICK)  # type: ignore[call-arg]  # fmt: skip
    assert [opened(entry).size for entry in answer.data] == [(64, 64)] * 2


def test_a_stream_shows_the_way(running, models):
    stream = running.client().images.generate(prompt=PROMPT, size="64x64", stream=True, partial_images=3,
                                              extra_body={"num_inference_steps": 12, "seed": 7})  # fmt: skip
    events = list(stream)
    assert [e.type.rpartition(".")[2] for e in events][-1] == "completed"
    partial = [e for e in events if e.type == "image_generation.partial_image"]
    indices = [e.partial_image_index for e in partial]
    assert indices == sorted(indices) and set(indices) <= {0, 1, 2} and indices
    assert all(opened(e).size == (64, 64) and e.size == "64x64" for e in partial)
    expected = alone(models, task(PROMPT, 64, steps=12, seed=7))[0]
    assert np.array_equal(opened(events[-1]), expected) and events[-1].usage.output_tokens == 16


def test_a_stream_of_an_edit_with_several_pictures(running):
    stream = running.client().images.edit(image=("a.png", png(picture(48, 48))), prompt=PROMPT, n=2, stream=True,
                                          partial_images=0, extra_body=QUICK)  # fmt: skip
    events = list(stream)
    assert [(e.type, e.index) for e in events] == [("image_edit.completed", 0), ("image_edit.completed", 1)]


def test_progress_of_a_stream(running):
    body = {"prompt": PROMPT, "size": "64x64", "stream": True, "progress": True, "num_inference_steps": 4}
    text = running.http.post("/v1/images/generations", json=body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    steps = [e["step"] for e in events if e["type"] == "image_generation.progress"]
    assert steps == sorted(steps) and events[-1]["type"] == "image_generation.completed"


WRONG = [
    ({"prompt": ""}, "prompt", "invalid_value", "the prompt is empty"),
    ({}, "prompt", "missing_parameter", "prompt must be given for /v1/images/generations"),
    ({"cfg": 3}, "cfg", "unknown_parameter", "there is no cfg for /v1/images/generations"),
    ({"guidance_scale": 3}, "guidance_scale", "unknown_parameter", "there is no guidance_scale: this model is not"),
    ({"n": 11}, "n", "invalid_value", "n must be an integer, 1 to 10, got 11"),
    ({"n": "2"}, "n", "invalid_value", "n must be an integer, 1 to 10, got '2'"),
    ({"size": "99999x16"}, "size", "invalid_size", "size must have a ratio of 1:3 to 3:1, got 99999x16"),
    ({"size": "99999x99999"}, "size", "invalid_size", "size must have at most 8294400 pixels, got 99999x9"),
    ({"size": "100x100"}, "size", "invalid_size", "the width in size must be a multiple of 16, got 100; try 96"),
    ({"size": "huge"}, "size", "invalid_size", "size must be WIDTHxHEIGHT or one of 1:1"),
    ({"size": "64x1024"}, "size", "invalid_size", "size must have a ratio of 1:3 to 3:1, got 64x1024"),
    ({"size": "4096x4096"}, "size", "invalid_size", "size must have at most 8294400 pixels"),
    ({"size": "0x0"}, "size", "invalid_size", "size must have sides of at least 16, got 0x0"),
    ({"true_cfg_scale": 0.5}, "true_cfg_scale", "invalid_value", "true_cfg_scale must be a number, 1 to 100, got 0.5"),
    ({"prompt": "\ud83d"}, "prompt", "invalid_value", "the prompt is not text: half of a surrogate pair"),
    ({"quality": "best"}, "quality", "invalid_value", "quality must be auto, low, medium, high, standard or hd"),
    ({"partial_images": 2}, "partial_images", "invalid_value", "partial_images has no effect without stream"),
    ({"stream": True, "partial_images": 4}, "partial_images", "invalid_value", "partial_images must be an integer, 0"),
    ({"output_compression": 50}, "output_compression", "invalid_value", "output_compression has no effect on png"),
    ({"background": "transparent"}, "background", "invalid_value", "background must be auto or opaque"),
    ({"negative_prompt": "x"}, "negative_prompt", "invalid_value", "negative_prompt has no effect without guidance"),
    ({"seed": -1}, "seed", "invalid_value", "seed must be an integer, 0 to"),
    ({"lora": [{"name": "style", "path": "/x"}]}, "lora", "invalid_value", "a lora has a name and a scale, got path"),
    ({"progress": True}, "progress", "invalid_value", "progress has no effect without stream"),
    ({"quality": "low", "num_inference_steps": 3}, "quality", "invalid_value", "give either quality or num_inference"),
]  # fmt: skip


@pytest.mark.parametrize("body, param, code, sentence", WRONG)
def test_what_is_wrong_is_named(running, body, param, code, sentence):
    body = body if "prompt" in body or not body else {"prompt": PROMPT, **body}
    content, kind = json.dumps(body), {"content-type": "application/json"}
    answer = running.http.post("/v1/images/generations", content=content, headers=kind)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code) and error["message"].startswith(sentence), error
    assert answer.headers["x-request-id"].startswith("req_")


def test_the_client_raises_its_own_errors(running):
    client = running.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, size="100x100")
    assert caught.value.code == "invalid_size" and caught.value.param == "size" and caught.value.request_id
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="there is no LoRA"):
        client.images.generate(prompt=PROMPT, extra_body={"lora": [{"name": "../../etc/passwd"}]})
    with pytest.raises(openai.BadRequestError, match="the mask|mask must"):
        client.images.edit(image=png(picture(64, 64)), mask=png(picture(64, 64)), prompt=PROMPT)
    with pytest.raises(openai.APIError, match="deadline|time"):
        list(client.images.generate(prompt=PROMPT, stream=True, size="64x64",
                                    extra_body={"timeout": 0.05, "num_inference_steps": 1000}))  # fmt: skip


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/nowhere", 404), ("GET", "/v1/images/generations", 405), ("GET", "/v1/jobs/img_0", 404),
    ("DELETE", "/v1/jobs/img_0", 404), ("GET", "/v1/models/nothing", 404), ("POST", "/v1/images/generations", 415),
    ("GET", "/v1/images/img_0/content", 404), ("POST", "/v1/images/generations?steps=3", 400),
    ("GET", "/v1/models?limit=3", 400),
])  # fmt: skip
def test_every_path_fails_in_one_form(running, method, path, status):
    answer = running.http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"} and answer.json()["error"]["message"]


def test_models(running):
    client = running.client()
    assert [m.id for m in client.models.list()] == ["tiny", "gpt-image-2"]
    assert client.models.retrieve("gpt-image-2").object == "model"


def test_urls_and_background_jobs(running):
    body = {"prompt": PROMPT, "size": "64x64", "response_format": "url", "progress": True, **QUICK}
    answer = running.http.post("/v1/images/generations", json=body, headers={"prefer": "respond-async"})
    shown = answer.json()
    assert answer.status_code == 202 and shown["status"] in ("queued", "generating") and shown["steps"] == 3
    events = running.http.get(f"{shown['poll_url']}/events").text
    assert events.rstrip().splitlines()[-2] == "event: job.completed"
    assert all(json.loads(line[6:])["id"] == shown["id"] for line in events.splitlines() if line.startswith("data: "))
    done = running.http.get(shown["poll_url"]).json()
    assert done["status"] == "completed" and done["result"]["data"][0]["url"].startswith(running.url)
    content = httpx.get(done["result"]["data"][0]["url"])
    assert content.headers["content-type"] == "image/png" and Image.open(io.BytesIO(content.content)).size == (64, 64)
    late = running.http.delete(shown["poll_url"])
    assert late.status_code == 409 and late.json()["error"]["code"] == "not_cancellable"


def test_a_job_is_cancelled(running):
    body = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 1000}
    shown = running.http.post("/v1/images/generations", json=body, headers={"prefer": "respond-async"}).json()
    gone = running.http.delete(shown["poll_url"]).json()
    assert gone["status"] == "cancelled" and gone["error"]["code"] == "cancelled"
    assert running.http.get(f"{shown['poll_url']}/events").text.startswith("event: error")


def test_a_deadline(running):
    body = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 1000}
    answer = running.http.post("/v1/images/generations", json=body, headers={"x-request-timeout-s": "0.1"})
    assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    both = running.http.post(
        "/v1/images/generations", json={**body, "timeout": 5}, headers={"x-request-timeout-s": "0.1"}
    )
    assert both.status_code == 400 and "give either timeout or the header" in both.json()["error"]["message"]


def test_a_deadline_is_kept_whatever_the_engine_does(models):
    """An engine that is in a long step, here one that never answers."""

    class Busy(Inside):
        def __init__(self, *arguments):
            self.models, self.cancelled = models, []
            super().__init__(*arguments)
            self.submit, self.cancel = lambda task: None, lambda *what: self.cancelled.append(what)

    running = Running(models, start=Busy)
    answer = running.http.post("/v1/images/generations", json={"prompt": PROMPT, "size": "64x64", "timeout": 0.1})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    assert [reason for _, reason in running.server.desk.engine.cancelled] == ["deadline"]
    assert not running.server.desk.jobs
    running.end()


NUMBERS = [
    "requests_total{", "request_seconds_bucket{", "queue_seconds_sum", "running ", "queued ", "images_total",
    "wave_seconds_count", "wave_requests_sum", 'stage_seconds_sum{stage="denoise"}', "steps_total", "pixels_total",
    "lora_loaded 1.0", "ready 1.0",
]  # fmt: skip


def test_metrics(running):
    running.client().images.generate(prompt=PROMPT, size="64x64", extra_body=QUICK)
    text = running.http.get("/metrics").text
    for name in NUMBERS:
        assert f"\nqwen_image_{name}" in text, name
    assert PROMPT not in text


def test_the_dashboard_shows_what_there_is(running):
    text = running.http.get("/metrics").text
    dashboard = (Path(__file__).parents[2] / "examples" / "serving" / "grafana.json").read_text(encoding="utf-8")
    named = set(re.findall(r"qwen_image_[a-z_]+", dashboard))
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    known = {family + end for family in families for end in ("", "_total", "_bucket", "_sum", "_count")}
    assert len(named) > 15 and named <= known, named - known


def test_steps_beside_lightning_are_those_that_are_made(running, tmp_path):
    more = {"lightning": 4, "num_inference_steps": 3}
    answer = running.http.post("/v1/images/generations", json={"prompt": "x", "size": "32x32", **more})
    (tmp_path / "x.png").write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    found = read_parameters(tmp_path / "x.png")
    assert (found["steps"], found["lightning"], found["cfg"]) == (3, 4, 1.0)
    refused = running.http.post("/v1/images/generations", json={"prompt": "x", "quality": "low", "lightning": 4})
    assert "give either quality or lightning, got both" in refused.json()["error"]["message"]
