"""Many requests for the tiny model: the engine against one request at a time and against diffusers behind a lock.

python -m benchmarks.serving --out results.json. All make the same pictures of mixed sizes, 64 to 128 pixels a side, in
one process, on one thread of the model, in turn for some rounds. Saturation: all requests are there at once. Poisson:
the same arrivals for each, at a share of what one request at a time can do. Beside a large one: small requests, alone
and while a large picture is made. Memory: many requests, and what the process holds after each tenth.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = 'a red circle and the text "{}" on a blue background'
SIDES = (64, 80, 96, 112, 128)


def requests(count: int, steps: int, seed: int) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [
        {"prompt": PROMPT.format(k), "width": chance.choice(SIDES), "height": chance.choice(SIDES), "seed": k,
         "steps": steps, "cfg": 1.0, "model": "tiny"}
        for k in range(count)
    ]  # fmt: skip


class Engine:
    """The engine of the server, in this process."""

    def __init__(self, pipe):
        from qwen_image_fast import QwenImagePipeline
        from qwen_image_fast.serving.engine import Engine as Served

        text = QwenImagePipeline.from_pipe(pipe)
        self.times: dict[str, tuple[float, float]] = {}
        self.large: list[float] = []  # seconds of waves of more tokens than half the limit
        self._seen: dict[str, float] = {}
        self._changed = threading.Condition()
        self.engine = Served(pipe, self._event, pipelines=lambda request: text)
        self.engine.start()

    def _event(self, event: Any) -> None:
        from qwen_image_fast.serving.messages import Cancelled, Failed, Finished, Stepped, WaveRan

        now = time.perf_counter()
        if isinstance(event, Stepped) and event.preview is not None:
            self._seen.setdefault(event.id, now)
        if isinstance(event, WaveRan) and event.tokens > self.engine.limits.wave_tokens // 2:
            self.large.append(event.seconds)
        if isinstance(event, Failed):
            raise RuntimeError(event.sentence)
        if isinstance(event, (Finished, Cancelled)):
            with self._changed:
                self.times[event.id] = (now, self._seen.pop(event.id, now))
                self._changed.notify_all()

    def submit(self, id: str, values: dict[str, Any], previews: int = 1) -> None:
        from qwen_image_fast.request import make
        from qwen_image_fast.serving.messages import Task

        self.engine.submit(Task(id, make("text", values), previews=previews))

    def wait(self, ids: set[str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ids <= self.times.keys())


class OneByOne:
    """Whatever makes one picture, behind a lock: a thread that takes requests in their order."""

    def __init__(self, make: Callable[[dict[str, Any]], Any]):
        self.make = make

    def run(self, wanted: list[dict[str, Any]], arrivals: list[float]) -> tuple[float, list[float]]:
        begin, seconds = time.perf_counter(), []
        for values, at in zip(wanted, arrivals):
            time.sleep(max(0.0, begin + at - time.perf_counter()))
            self.make(values)
            seconds.append(time.perf_counter() - begin - at)
        return time.perf_counter() - begin, seconds


def served(engine: Engine, wanted: list[dict[str, Any]], arrivals: list[float], name: str) -> dict[str, Any]:
    begin = time.perf_counter()
    for k, (values, at) in enumerate(zip(wanted, arrivals)):
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        engine.submit(f"{name}-{k}", values)
    ids = [f"{name}-{k}" for k in range(len(wanted))]
    engine.wait(set(ids))
    total = time.perf_counter() - begin
    done = [engine.times[id][0] - begin - at for id, at in zip(ids, arrivals)]
    previews = [engine.times[id][1] - begin - at for id, at in zip(ids, arrivals)]
    return {
        **summary(total, done),
        "first preview p50": quantile(previews, 0.5),
        "first preview p95": quantile(previews, 0.95),
    }


def quantile(values: list[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 4)


def summary(total: float, seconds: list[float]) -> dict[str, Any]:
    return {
        "pictures per second": round(len(seconds) / total, 3),
        "p50": quantile(seconds, 0.5),
        "p95": quantile(seconds, 0.95),
    }


def beside_a_large_one(engine: Engine, steps: int, side: int, count: int) -> dict[str, Any]:
    """Small requests one after another, alone, and while a large picture is made."""
    small = {"prompt": PROMPT.format("A"), "width": 64, "height": 64, "steps": steps, "cfg": 1.0, "model": "tiny"}
    found: dict[str, Any] = {}
    for name in ("alone", "beside"):
        if name == "beside":
            engine.submit("large", {**small, "width": side, "height": side, "steps": 1000, "seed": 1}, previews=0)
            time.sleep(3)
            engine.large = []
        seconds = []
        for k in range(count):
            began = time.perf_counter()
            engine.submit(f"small-{name}-{k}", {**small, "seed": k}, previews=0)
            engine.wait({f"small-{name}-{k}"})
            seconds.append(time.perf_counter() - began)
        found[name] = {"p50": quantile(seconds, 0.5), "p95": quantile(seconds, 0.95)}
    engine.engine.cancel("large")
    engine.wait({"large"})
    found["a wave of the large one"] = round(statistics.median(engine.large), 4)
    return found


def memory(engine: Engine, count: int) -> list[int]:
    """Megabytes of the process after each tenth of the requests."""
    found = []
    for part in range(10):
        each = requests(count // 10, 2, part)
        for k, values in enumerate(each):
            engine.submit(f"memory-{part}-{k}", values, previews=1)
            if k % 10 == 9:  # some are cancelled, wherever they are
                engine.engine.cancel(f"memory-{part}-{k - 5}")
        engine.wait({f"memory-{part}-{k}" for k in range(len(each))})
        engine.times.clear()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        found.append(pages * resource.getpagesize() // 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--load", type=float, default=0.8, help="arrivals, as a share of what one at a time can do")
    parser.add_argument("--large", type=int, default=512, help="side of the large picture")
    parser.add_argument("--memory", type=int, default=1000, help="requests of the test of memory; 0: none")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    import diffusers
    import torch

    from benchmarks.harness import processor_name
    from benchmarks.waiting import busy_share
    from qwen_image_fast import QwenImageEditPlusPipeline, QwenImagePipeline
    from qwen_image_fast.folders import SHIPPED

    torch.set_num_threads(1)
    pipe = QwenImageEditPlusPipeline.from_pretrained("tiny", torch_dtype=torch.float32)
    text = QwenImagePipeline.from_pipe(pipe)
    theirs = diffusers.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    call = {"true_cfg_scale": 1.0}

    def ours(values: dict[str, Any]) -> None:
        text(values["prompt"], width=values["width"], height=values["height"], seed=values["seed"],
             num_inference_steps=values["steps"], progress=False, **call)  # fmt: skip

    def by_diffusers(values: dict[str, Any]) -> None:
        theirs(values["prompt"], width=values["width"], height=values["height"], num_inference_steps=values["steps"],
               generator=torch.Generator().manual_seed(values["seed"]), **call)  # fmt: skip

    engine = Engine(pipe)
    ways: dict[str, Any] = {"one at a time": OneByOne(ours), "diffusers behind a lock": OneByOne(by_diffusers)}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"saturation": {}, "poisson": {}}
    busy = []
    for number in range(options.rounds + 1):  # once more, for warming up
        wanted = requests(options.count if number else 4, options.steps, number)
        at_once = [0.0] * len(wanted)
        busy.append(round(busy_share(), 2))
        results = {"engine": served(engine, wanted, at_once, f"at once {number}")}
        results |= {name: summary(*way.run(wanted, at_once)) for name, way in ways.items()}
        rate = options.load * results["one at a time"]["pictures per second"]
        chance, arrivals = random.Random(number), [0.0]
        while len(arrivals) < len(wanted):
            arrivals.append(arrivals[-1] + chance.expovariate(rate))
        poisson = {"engine": served(engine, wanted, arrivals, f"poisson {number}")}
        poisson["one at a time"] = summary(*ways["one at a time"].run(wanted, arrivals))
        for kind, values in (("saturation", results), ("poisson", poisson)) if number else ():
            for name, one in values.items():
                found[kind].setdefault(name, []).append(one)
                print(kind, number, name, one, flush=True)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "processor": processor_name(), "processors": os.cpu_count(),
        "threads of the model": torch.get_num_threads(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "requests of a round": options.count, "steps": options.steps, "sides": SIDES, "load of poisson": options.load,
        "share of the machine in use before each round": busy, "rounds": found,
        "median": {
            kind: {way: {key: round(statistics.median(one[key] for one in rounds), 4) for key in rounds[0]}
                   for way, rounds in ways.items()} for kind, ways in found.items()
        },
    }  # fmt: skip
    rates = {way: one["pictures per second"] for way, one in report["median"]["saturation"].items()}
    report["engine over"] = {way: round(rates["engine"] / rate, 2) for way, rate in rates.items() if way != "engine"}
    print(report["engine over"])
    report["small requests"] = beside_a_large_one(engine, options.steps, options.large, 20)
    print(report["small requests"])
    if options.memory:
        report["megabytes after each tenth"] = memory(engine, options.memory)
        print(report["megabytes after each tenth"])
    engine.engine.end()
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
