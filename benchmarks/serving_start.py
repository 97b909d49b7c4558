"""How soon a server is of use: its address, its model, its first picture, its page.

python -m benchmarks.serving_start --out results.json. Each run starts `qwen-image-fast serve --model tiny` as from a
shell, in processes without anything left from the run before but the files that the system keeps in memory. Seconds
from the start of the command, but for the page: from its address to a button that can be pressed, in a fresh profile
of a browser that runs already.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

BODY = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 3, "seed": 1}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def until(check, seconds: float = 300.0):
    """What `check` returns, once it is true."""
    end = time.perf_counter() + seconds
    while not (found := check()):
        if time.perf_counter() > end:
            raise RuntimeError("the server does not answer")
        time.sleep(0.01)
    return found


def start(browser) -> dict[str, float]:
    """Seconds of one start."""
    found: dict[str, float] = {}
    command = [sys.executable, "-m", "qwen_image_fast", "serve", "--model", "tiny", "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            url = until(lambda: re.search(r"http://[\d.:]+", log.read_text()))[0]
            found["address"] = time.perf_counter() - began
            with httpx.Client(base_url=url, timeout=300) as client:
                until(lambda: client.get("/readyz").status_code == 200)
                found["ready"] = time.perf_counter() - began
                client.post("/v1/images/generations", json=BODY).raise_for_status()
                found["first picture"] = time.perf_counter() - began
            if browser is not None:
                context = browser.new_context(viewport={"width": 1280, "height": 900})
                page = context.new_page()
                since = time.perf_counter()
                page.goto(url, wait_until="commit")
                page.wait_for_selector("#generate:enabled")
                found["page usable"] = time.perf_counter() - since
                context.close()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from benchmarks.harness import processor_name

    if CHROMIUM is None:
        print("there is no Chromium: the page is not measured", file=sys.stderr)
        runs = [start(None) for _ in range(arguments.runs)]
    else:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
            )
            runs = [start(browser) for _ in range(arguments.runs)]
            browser.close()
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    load = os.getloadavg()[0]
    found = {
        "machine": {"cpu": processor_name(), "cores": os.cpu_count(), "load at the end": round(load, 1)},
        "date": datetime.date.today().isoformat(),
        "seconds": medians,
        "runs": [{name: round(value, 3) for name, value in run.items()} for run in runs],
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
