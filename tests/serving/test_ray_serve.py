"""Ray Serve around the server, on one node: a picture, a stream, one request too many, one more replica under load."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving_harness import PROMPTS, alone, task

pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)
EXAMPLE = Path(__file__).parents[2] / "examples" / "serving" / "ray_serve.py"
HANGS = 600  # seconds after which the test is taken to hang, on however busy a machine
LONG = {"prompt": PROMPTS[0], "size": "64x64", "num_inference_steps": 400, "seed": 0}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Replicas, one at first, that work on two requests at a time, while two more may wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, str(EXAMPLE), "--port", str(port), "--ongoing", "2", "--queued", "2"]
    command += ["--replicas", "2", "--upscale", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray ends a proxy that is not there within 5 s, as on a busy machine it is not.
    environment["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "600"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + HANGS
        while _status(f"http://127.0.0.1:{port}/readyz") != 200:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def _status(url):
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.HTTPError:
        return None


def test_pictures_and_streams(url, models):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=HANGS, max_retries=0)
    body = {"num_inference_steps": 3, "seed": 7}
    expected = alone(models, task(PROMPTS[0], 64, steps=3, seed=7))[0]
    found = client.images.generate(prompt=PROMPTS[0], size="64x64", extra_body=body).data[0].b64_json
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(found))), expected)
    body["num_inference_steps"] = 60  # so that the first preview is read before the last step
    events = list(
        client.images.generate(prompt=PROMPTS[0], size="64x64", stream=True, partial_images=2, extra_body=body)
    )
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds[0] == "partial_image" and kinds[-1] == "completed" and len(kinds) <= 3
    with pytest.raises(openai.BadRequestError, match="there is no nonsense"):
        client.images.generate(prompt="x", extra_body={"nonsense": 1})
    assert re.search(r"qwen_image_images_total [2-9]", httpx.get(f"{url}/metrics").text)


def test_one_request_too_many_is_refused_by_ray(url):
    answers = []

    def ask():
        answers.append(httpx.post(f"{url}/v1/images/generations", json=LONG, timeout=HANGS))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    full = [answer for answer in answers if answer.status_code == 429]
    assert full and sum(answer.status_code == 200 for answer in answers) == 8 - len(full) >= 2
    assert all(int(float(answer.headers["retry-after"])) == 5 for answer in full)


def test_load_starts_a_replica(url):
    """Six requests at once are two more than one replica takes; as they go on, a second one comes that takes them, and
    makes the same pictures."""
    made = set()

    def ask(found):
        found.append(httpx.post(f"{url}/v1/images/generations", json=LONG, timeout=HANGS))

    for _ in range(60):  # which take the longer, the busier the machine is that starts a replica
        answers = []
        threads = [threading.Thread(target=ask, args=(answers,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} <= {200, 429} and len(answers) == 6
        refused = any(answer.status_code == 429 for answer in answers)
        made |= {answer.json()["data"][0]["b64_json"] for answer in answers if answer.status_code == 200}
        if not refused and len(_replicas()) >= 2:
            break
    else:
        pytest.fail("no second replica came")
    assert len({_pixels(picture) for picture in made}) == 1


def _replicas():
    """Ray's processes of this test's application, by the names that it gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes()
        except OSError:
            continue  # it has ended
        if title.startswith(b"ray::ServeReplica") and b"qwen-image-fast" in title:
            found.append(path)
    return found


def _pixels(encoded):
    return Image.open(io.BytesIO(base64.b64decode(encoded))).tobytes()
