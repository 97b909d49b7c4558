"""Many requests over HTTP, some of them malformed and some cancelled: is one lost, are two mixed up, does memory grow?

python -m benchmarks.serving_requests --count 10000 --out results.json. The real server, `qwen-image-fast serve --model
tiny`, as it is started from a shell; clients that each wait for their answer before they ask again. Of ten requests one
is malformed, in a way of its own, and one is cancelled: its client leaves a stream, or deletes a job. A picture says in
its file what it was made with, so that a mixed-up one is seen; every hundredth is made again at the end, alone, and
must have the same pixels. Memory is that of both processes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import datetime
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

PROMPT = "a red circle, number {:06d}"
SIDES = (32, 48, 64)
EACH = 100  # requests after which memory is read
MALFORMED: list[tuple[dict[str, Any], int]] = [
    ({"content": b"{"}, 400),
    ({"json": {"prompt": ""}}, 400),
    ({"json": {"prompt": "x", "nonsense": 1}}, 400),
    ({"json": {"prompt": "x", "size": "33x32"}}, 400),
    ({"json": {"prompt": "x", "n": 11}}, 400),
    ({"json": {"prompt": "x", "model": "other"}}, 404),
    ({"json": {"prompt": "x", "lora": [{"name": "../x"}]}}, 404),
    ({"content": b"prompt=x", "headers": {"content-type": "text/plain"}}, 415),
]


def body(k: int) -> dict[str, Any]:
    return {"prompt": PROMPT.format(k), "size": f"{SIDES[k % 3]}x{SIDES[k // 3 % 3]}", "seed": k,
            "num_inference_steps": 1 + k % 2}  # fmt: skip


class Clients:
    """What they asked and what came: `counts` by what it was, `faults` in words, pixels of every hundredth."""

    def __init__(self, client: httpx.AsyncClient, count: int, seconds: float, pids: list[int]):
        self.client, self.count, self.pids = client, count, pids
        self.until = time.perf_counter() + seconds
        self.next, self.done = 0, 0
        self.counts = dict.fromkeys(("pictures", "malformed", "cancelled", "too late to cancel", "told to wait"), 0)
        self.faults: list[str] = []
        self.kept: dict[int, bytes] = {}
        self.megabytes: list[int] = []

    async def work(self) -> None:
        while self.next < self.count and time.perf_counter() < self.until:
            k, self.next = self.next, self.next + 1
            await self.ask(k)
            self.done += 1
            if self.done % EACH == 0:
                self.megabytes.append(sum(map(held, self.pids)))
                print(self.done, self.megabytes[-1], "MB", self.counts, len(self.faults), "faults", flush=True)

    async def ask(self, k: int) -> None:
        if k % 10 == 3:
            given, status = MALFORMED[k // 10 % len(MALFORMED)]
            if "content" in given:
                given = {"headers": {"content-type": "application/json"}, **given}
            answer = await self.client.post("/v1/images/generations", **given)
            good = answer.status_code == status and answer.json()["error"]["message"]
            self.say(good, k, "malformed", answer.text)
        elif k % 10 == 7:
            await (self.leave if k % 20 == 7 else self.delete)(k)
        else:
            pixels, text = await self.picture(k)
            self.say(pixels is not None, k, "pictures", text)
            if k % 100 == 0 and pixels is not None:
                self.kept[k] = pixels

    def say(self, good: Any, k: int, what: str, text: str) -> None:
        if good:
            self.counts[what] += 1
        else:
            self.faults.append(f"{k}, {what}: {text[:200]}")

    async def posted(self, k: int, **options: Any) -> httpx.Response:
        """An answer that is not "come back later", which is done as it asks."""
        while True:
            answer = await self.client.post("/v1/images/generations", json=body(k), **options)
            if answer.status_code != 429:
                return answer
            self.counts["told to wait"] += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))

    async def picture(self, k: int) -> tuple[bytes | None, str]:
        """Its pixels, if it is the one that was asked for; else what is wrong."""
        from PIL import Image

        answer = await self.posted(k)
        if answer.status_code != 200:
            return None, answer.text
        entry = answer.json()["data"][0]
        image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
        told = " ".join(str(value) for value in getattr(image, "text", {}).values())
        size = f"{image.width}x{image.height}"
        if entry["seed"] != k or PROMPT.format(k) not in told or size != body(k)["size"]:
            return None, f"another picture: seed {entry['seed']}, {size}, {told}"
        return image.tobytes(), ""

    async def leave(self, k: int) -> None:
        """Open a stream of many steps, and go after its first event."""
        values = {**body(k), "num_inference_steps": 1000, "stream": True, "progress": True}
        wait: float | None = 0.0
        while wait is not None:
            await asyncio.sleep(wait)
            wait = None
            async with self.client.stream("POST", "/v1/images/generations", json=values) as answer:
                if answer.status_code == 429:
                    self.counts["told to wait"] += 1
                    wait = float(answer.headers["retry-after"])
                    continue
                async for line in answer.aiter_lines():
                    if line.startswith("event:"):
                        self.say(".progress" in line, k, "cancelled", line)
                        return
        self.say(False, k, "cancelled", "a stream without an event")

    async def delete(self, k: int) -> None:
        job = await self.posted(k, headers={"prefer": "respond-async"})
        if job.status_code != 202:
            self.say(False, k, "cancelled", job.text)
            return
        gone = await self.client.delete(job.json()["poll_url"])
        late = gone.status_code == 409  # it was done already
        good = late or (gone.status_code == 200 and gone.json()["status"] in ("cancelled", "completed"))
        self.say(good, k, "too late to cancel" if late else "cancelled", gone.text)


def held(pid: int) -> int:
    """Megabytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() // 2**20


async def run(url: str, server: int, options: argparse.Namespace) -> dict[str, Any]:
    """The report, without what it says of the machine."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text(encoding="ascii").split()
    engine = [int(n) for n in children if b"spawn_main" in Path(f"/proc/{n}/cmdline").read_bytes()]
    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        clients = Clients(client, options.count, options.seconds, [server, *engine])
        began = time.perf_counter()
        await asyncio.gather(*(clients.work() for _ in range(options.clients)))
        seconds = time.perf_counter() - began
        different = [k for k, pixels in clients.kept.items() if (await clients.picture(k))[0] != pixels]
        metrics = (await client.get("/metrics")).text
    running = [float(n) for n in re.findall(r"^qwen_image_(?:running|queued) ([\d.]+)$", metrics, re.MULTILINE)]
    return {
        "requests": clients.done, "clients": options.clients, "seconds": round(seconds, 1), "answers": clients.counts,
        "lost or mixed up": clients.faults, "made again": len(clients.kept), "different when made alone": different,
        "running and queued at the end": running, f"megabytes after each {EACH}": clients.megabytes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which nothing more is asked")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()

    from benchmarks.harness import processor_name

    command = [sys.executable, "-m", "qwen_image_fast", "serve", "--model", "tiny"]
    command += ["--port", "0", "--keep-seconds", "30"]
    with tempfile.NamedTemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            url = ready(Path(log.name), server)
            report = asyncio.run(run(url, server.pid, options))
            server.send_signal(signal.SIGTERM)
            report["exit code"] = server.wait(60)
        finally:
            server.kill()
            server.wait()
    report = {"date": datetime.date.today().isoformat(), "processor": processor_name(), "processors": os.cpu_count(),
              **report}  # fmt: skip
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def ready(log: Path, server: subprocess.Popen) -> str:
    """The server's address, once it answers."""
    while server.poll() is None:
        found = re.search(r"http://[\d.:]+", log.read_text(encoding="utf-8"))
        try:
            if found and httpx.get(f"{found[0]}/readyz").status_code == 200:
                return found[0]
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(log.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
