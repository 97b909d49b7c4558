"""Full, gone, ending, crashed: every request is answered, and the server lives."""

import asyncio
import base64
import io
import json
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
import openai
import pytest
from http_harness import Running
from PIL import Image
from serving_harness import picture, png

from qwen_image_fast.serving.run import listen

PROMPT = "a red circle on the left of a blue square"
LONG = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 1000, "seed": 0}
ASYNC = {"prefer": "respond-async"}
HANGS = 600  # seconds after which a test of real processes is taken to hang, on however busy a machine


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_full_server_says_when_to_come_back(models):
    server = Running(models, limits={"queued": 2})
    jobs = [server.http.post("/v1/images/generations", json=LONG, headers=ASYNC) for _ in range(40)]
    full = [job for job in jobs if job.status_code == 429]
    taken = [job.json() for job in jobs if job.status_code == 202]
    assert full and len(taken) >= 3
    assert full[0].json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(full[0].headers["retry-after"]) <= 120

    def refused():
        """Not at once, where the wave has taken in one that waited."""
        try:
            answer = server.client().images.with_raw_response.generate(
                prompt=PROMPT, size="64x64", extra_body={"num_inference_steps": 1000}, extra_headers=ASYNC
            )
        except openai.RateLimitError:
            return True
        taken.append(answer.http_response.json())
        return False

    until(refused)
    waiting = threading.Timer(0.5, lambda: [server.http.delete(job["poll_url"]) for job in taken])
    waiting.start()
    answer = server.client(retries=5).images.generate(
        prompt=PROMPT, size="64x64", extra_body={"num_inference_steps": 2}
    )
    assert answer.data[0].b64_json
    waiting.join()
    assert re.search(r'qwen_image_rejected_total{reason="full"} [1-9]', server.http.get("/metrics").text)
    server.end()


def test_a_long_wait_is_refused_by_its_length(models):
    server = Running(models, limits={"wait": 1.0})
    server.client().images.generate(prompt=PROMPT, size="64x64", extra_body={"num_inference_steps": 20})
    until(lambda: server.server.desk.rate > 0)
    first = server.http.post("/v1/images/generations", json={**LONG, "n": 10}, headers=ASYNC)
    assert first.status_code == 202  # nothing else is here: whatever it takes
    answer = server.http.post("/v1/images/generations", json=LONG)
    assert answer.status_code == 429 and "it would be done in about" in answer.json()["error"]["message"]
    server.http.delete(first.json()["poll_url"])
    server.end()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(running, stream):
    body = json.dumps({**LONG, "stream": stream, "partial_images": 1 if stream else 0}).encode()

    async def leave():
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        if stream:
            await reader.readuntil(b"partial_image")
        while not any(job.step for job in running.server.desk.jobs.values()):
            await asyncio.sleep(0.01)
        writer.close()

    asyncio.run(leave())
    until(lambda: not running.server.desk.jobs, 10)
    until(lambda: 'status="499"' in running.http.get("/metrics").text, 10)
    assert 'qwen_image_cancelled_total{reason="disconnected"}' in running.http.get("/metrics").text


def test_a_client_that_reads_slowly_holds_up_nobody(running):
    """With sockets' buffers so small that most of the answer waits in the server for its reader."""
    values = {**LONG, "size": "256x256", "num_inference_steps": 6, "stream": True, "partial_images": 3, "n": 4}
    body = json.dumps(values).encode()

    async def slow():
        running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of connections that come
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=64)
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        await reader.read(1)
        answer = await asyncio.to_thread(
            running.http.post, "/v1/images/generations", json={**LONG, "num_inference_steps": 2}
        )
        assert answer.status_code == 200
        while running.server.desk.jobs:
            await asyncio.sleep(0.01)
        answer = await asyncio.to_thread(
            running.http.post, "/v1/images/generations", json={**LONG, "num_inference_steps": 2}
        )
        assert answer.status_code == 200  # with one answer that nobody has read yet
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):  # a little at a time, to the last byte
            part = await asyncio.wait_for(reader.read(2000), 60)
            assert part, "the server gave up"
            rest += part
        writer.close()
        text = b"".join(chunk for chunk in rest.split(b"\r\n") if b":" in chunk)
        done = [line for line in text.split(b"\n") if line.startswith(b"data: ") and b".completed" in line]
        pictures = [Image.open(io.BytesIO(base64.b64decode(json.loads(line[6:])["b64_json"]))) for line in done]
        assert len(rest) > 250_000 and [p.size for p in pictures] == [(256, 256)] * 4

    usual = running.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    try:
        asyncio.run(slow())
    finally:
        running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, usual // 2)  # the system doubles it


def test_results_expire(models):
    server = Running(models, limits={"store_seconds": 0.3})
    body = {**LONG, "num_inference_steps": 2, "response_format": "url"}
    url = server.http.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    assert httpx.get(url).status_code == 200
    until(lambda: httpx.get(url).status_code == 410)
    server.end()
    server = Running(models, limits={"store_bytes": 8_000})
    jobs = [server.http.post("/v1/images/generations", json=body).json()["id"] for _ in range(6)]
    found = [server.http.get(f"/v1/jobs/{id}").status_code for id in jobs]
    assert found[0] == 410 and found[-1] == 200 and server.server.desk.store.bytes <= 8_000
    server.end()


def test_draining(models):
    server = Running(models, limits={"drain": 30})
    job = server.http.post("/v1/images/generations", json={**LONG, "num_inference_steps": 60}, headers=ASYNC).json()
    draining = asyncio.run_coroutine_threadsafe
    loop = next(iter(server.uvicorn.servers)).get_loop()
    future = draining(server.server.desk.drain(), loop)
    until(lambda: server.http.get("/readyz").status_code == 503)
    answer = server.http.post("/v1/images/generations", json=LONG)
    assert (
        answer.status_code == 503 and answer.json()["error"]["code"] == "draining" and "retry-after" in answer.headers
    )
    future.result(60)
    assert server.http.get(f"/v1/jobs/{job['id']}").json()["status"] == "completed"
    server.end()


def test_many_bad_requests_and_cancels_among_good_ones(models):
    """None is lost or mixed up."""
    running, answers = Running(models, limits={"wait": 10_000}), {}

    def ask(k):
        with httpx.Client(base_url=running.url, timeout=60) as client:
            if k % 10 == 0:
                answers[k] = client.post("/v1/images/generations", json={"prompt": PROMPT, "nonsense": k})
            elif k % 10 == 5:
                shown = client.post("/v1/images/generations", json=LONG, headers=ASYNC).json()
                answers[k] = client.delete(shown["poll_url"])
            elif k % 10 == 7:
                form = {"prompt": PROMPT, "num_inference_steps": "2", "seed": str(k)}
                answers[k] = client.post("/v1/images/edits", files={"image": png(picture(48, 48))}, data=form)
            else:
                body = {**LONG, "num_inference_steps": 2 + k % 3, "seed": k, "size": f"{48 + 16 * (k % 4)}x64"}
                answers[k] = client.post("/v1/images/generations", json=body)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, answer in answers.items():
        if k % 10 == 0:
            assert answer.status_code == 400 and "nonsense" in answer.text
        elif k % 10 == 5:
            assert answer.json()["status"] == "cancelled"
        else:
            assert answer.status_code == 200 and answer.json()["data"][0]["seed"] == k
            size = "48x48" if k % 10 == 7 else f"{48 + 16 * (k % 4)}x64"
            assert answer.json()["size"] == size
    assert len(answers) == 40 and not running.server.desk.jobs
    running.end()


def test_a_port_in_use():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is in use: give another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(OSError, match="192.0.2.1 is no address of this machine"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("args, sentence", [
    ("--model nowhere/at/all", "nowhere"), ("--model tiny --port 99999", "'--port'"),
    ("--model tiny --dtype int3", "--dtype"),
    ("--model tiny --insecure", "--insecure has no effect on 127.0.0.1"),
    ("--model tiny --insecure --api-key-file {keys}", "--insecure has no effect with --api-key-file"),
    ("--model tiny --allow-host a.example --api-key-file {keys}", "--allow-host has no effect with --api-key-file"),
    ("--model tiny --allow-host http://a.example", "--allow-host must be a name without scheme and port"),
    ("--model tiny --image-url-host a.example:443", "--image-url-host must be a name without scheme and port"),
    ("--model tiny --parallel auto --device cpu", "--parallel auto counts GPUs, and the model is on the CPU"),
    ("--model tiny --parallel guidance=3 --device cpu", "--parallel: guidance must be 1 or 2"),
    ("--model tiny --transformer {keys}.safetensors", "keys.safetensors"),
    ("--model tiny --transformer {wrong}", "--transformer {wrong}"),
    ("--model tiny --lora {wrong}", "--lora {wrong}"),
])  # fmt: skip
def test_what_cannot_be_served(args, sentence, tmp_path):
    """Each is said before the model is read."""
    import torch
    from safetensors.torch import save_file
    from typer.testing import CliRunner

    from qwen_image_fast.cli import app

    files = {"keys": tmp_path / "keys", "wrong": tmp_path / "wrong.safetensors"}
    files["keys"].write_text(json.dumps([{"name": "studio", "key": "0123456789abcdef"}]))
    save_file({"nothing.weight": torch.zeros(2, 2)}, files["wrong"])
    result = CliRunner().invoke(app, ["serve", "--port", "0", *args.format(**files).split()])
    assert result.exit_code in (1, 2) and sentence.format(**files) in result.stderr
    assert "Traceback" not in result.stderr


def test_not_enough_memory_is_said_before_loading(monkeypatch):
    from typer.testing import CliRunner

    from qwen_image_fast.cli import app, serve

    monkeypatch.setattr(serve, "_free", lambda device: 1000)
    result = CliRunner().invoke(app, ["serve", "--model", "tiny", "--port", "0"])
    assert result.exit_code == 1 and "error: the weights take 0.0 GiB in float32, and this machine has" in result.stderr


def test_a_lora_of_edits_alone_is_remarked_on(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file
    from typer.testing import CliRunner

    from qwen_image_fast.cli import app, serve

    monkeypatch.setattr(serve, "_free", lambda device: 1000)
    layer = "transformer.transformer_blocks.1.attn.to_out.0"
    state = {f"{layer}.lora_A.weight": torch.zeros(2, 192), f"{layer}.lora_B.weight": torch.zeros(192, 2)}
    for tasks, count in (("ti2i recon", 1), ("t2i ti2i", 0)):
        save_file(state, tmp_path / "a.safetensors", {"qwen_image_fast.tasks": tasks})
        words = ["serve", "--model", "tiny", "--port", "0", "--lora", f"frame={tmp_path}/a.safetensors"]
        result = CliRunner().invoke(app, words)
        assert "the weights take" in result.stderr, result.output
        assert result.stderr.count(f"note: --lora frame={tmp_path}/a.safetensors was trained on edits alone") == count


@pytest.mark.parametrize("parallel", [[], ["--parallel", "guidance=2", "--device", "cpu"]], ids=["one", "group"])
def test_the_command_serves_survives_a_crash_and_ends(tmp_path, parallel):
    """The real thing: a process beside the server's, or a group of which one is killed, OpenAI's client, SIGTERM while
    a request runs."""
    command = [sys.executable, "-m", "qwen_image_fast", "serve", "--model", "tiny", "--port", "0", *parallel]
    command += ["--max-wait", "1e6", "--drain-timeout", str(HANGS)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = lambda: (tmp_path / "log").read_text()  # noqa: E731
    try:
        until(lambda: re.search(r"http://127.0.0.1:\d+  tiny is being loaded", said()), HANGS)
        url = re.search(r"http://127.0.0.1:\d+", said())[0]
        http = httpx.Client(base_url=url, timeout=HANGS)
        ready = lambda: http.get("/readyz").status_code == 200  # noqa: E731
        until(ready, HANGS)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=50, timeout=HANGS)
        short = {"prompt": PROMPT, "size": "64x64", "extra_body": {"num_inference_steps": 2, "seed": 1}}
        first = client.images.generate(**short).data[0].b64_json
        # Of more steps than the time until the kill can hold; a stream says when they have begun.
        endless, found = {**LONG, "n": 10}, {}
        waiting = threading.Thread(
            target=lambda: found.update(crashed=http.post("/v1/images/generations", json=endless))
        )
        with http.stream(
            "POST", "/v1/images/generations", json={**endless, "stream": True, "progress": True}
        ) as stream:
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("event: ")).endswith(".progress")
            waiting.start()
            until(lambda: _here(http) == 2, HANGS)
            os.kill(_children(process.pid)[-1], signal.SIGKILL)
            assert "engine_crashed" in "".join(lines)
        waiting.join()
        assert found["crashed"].status_code == 500 and found["crashed"].headers["x-should-retry"] == "true"
        assert found["crashed"].json()["error"]["code"] == "engine_crashed"
        assert http.get("/health").status_code == 200
        until(ready, HANGS)
        assert client.images.generate(**short).data[0].b64_json == first
        last = {**LONG, "num_inference_steps": 200, "stream": True, "progress": True}
        with http.stream("POST", "/v1/images/generations", json=last) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line.endswith(".progress"))
            process.send_signal(signal.SIGTERM)
            assert "event: image_generation.completed" in list(lines)
        assert process.wait(HANGS) == 0, said()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_what_runs(tmp_path, number):
    """Whoever waits gets OpenAI's error, and no process is left."""
    command = [sys.executable, "-m", "qwen_image_fast", "serve", "--model", "tiny", "--port", "0"]
    command += ["--drain-timeout", str(HANGS)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = lambda: (tmp_path / "log").read_text()  # noqa: E731
    try:
        until(lambda: re.search(r"http://127.0.0.1:\d+  tiny is being loaded", said()), HANGS)
        http = httpx.Client(base_url=re.search(r"http://127.0.0.1:\d+", said())[0], timeout=HANGS)
        until(lambda: http.get("/readyz").status_code == 200, HANGS)
        found = {}
        endless = {**LONG, "n": 10, "num_inference_steps": 200}
        waiting = threading.Thread(
            target=lambda: found.update(answer=http.post("/v1/images/generations", json=endless))
        )
        waiting.start()
        until(lambda: _here(http) == 1, HANGS)
        [engine] = _children(process.pid)
        process.send_signal(number)
        until(lambda: http.get("/readyz").status_code == 503, HANGS)
        process.send_signal(number)
        assert process.wait(HANGS) == 0, said()
        waiting.join()
        assert found["answer"].status_code == 500 and found["answer"].json()["error"]["code"] == "engine_crashed"
        assert not Path(f"/proc/{engine}").exists() and "Traceback" not in said()
        lines = [json.loads(line) for line in said().splitlines() if line.startswith("{")]
        ready, *_ = [line for line in lines if line["message"] == "ready"]
        assert ready["model"] == "tiny" and not {"cost", "memory", "enough_rows", "free"} & ready.keys()
        assert [line["requests"] for line in lines if line["message"] == "ending"] == [1]
    finally:
        process.kill()
        process.wait()


def test_a_process_of_an_engine_leaves_nothing_behind():
    """As whoever looks after the semaphores of processes that ended would say, on the same standard error."""
    code = "import multiprocessing as m; m.set_start_method('spawn'); from tqdm.auto import tqdm; import os; "
    code += "from qwen_image_fast.serving.followers import begin_process; begin_process(); "
    code += "print(sum(tqdm(range(3), disable=False, mininterval=99))); import sys; sys.stdout.flush(); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
    assert done.stdout == "3\n" and "resource_tracker" not in done.stderr, done.stderr


def _here(http):
    """Requests that wait or run."""
    metrics = http.get("/metrics").text
    return sum(float(n) for n in re.findall(r"^qwen_image_(?:running|queued) (\S+)$", metrics, re.MULTILINE))


def _children(pid):
    """The engine's processes, in the order in which they were started: those that run Python's spawn."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(n) for n in children if b"spawn_main" in Path(f"/proc/{n}/cmdline").read_bytes()]


def test_an_engine_whose_thread_fails_is_not_alive(models):
    """So that its process ends, and another one begins."""
    from qwen_image_fast.serving.engine import Engine

    engine = Engine(models.pipe, lambda event: None, pipelines=models.pipeline)
    engine.start()
    assert engine.is_alive
    engine._side.put(lambda: 1 / 0, finishes=True)
    until(lambda: not engine.is_alive, 10)
    engine.end()
