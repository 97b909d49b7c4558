"""Every extra in a clean environment of its own: what it promises is imported and run.

python -m tests.extras WHEEL [train data ...]; results go to benchmarks/results/extras.json, where those of other extras
are kept. Environments are made below `--work` and removed after use; packages come from where pip is told to find them,
in the versions of constraints.txt.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "extras.json"
TINY = "--size 64x64 --steps 1 --device cpu"
DROP_IN = """
import torch, qwen_image_fast
from diffusers import QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from peft import LoraConfig
pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
print(qwen_image_fast.accelerate(pipe))
pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
pipe("a red circle", height=64, width=64, num_inference_steps=1, true_cfg_scale=1.0)
"""
SERVE = """
import json, socket, subprocess, sys, time
from urllib.request import Request, urlopen
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "-m", "qwen_image_fast", "serve", "--model", "tiny", "--port", str(port)]
server = subprocess.Popen(command)
try:
    for _ in range(240):
        try:
            urlopen(f"http://127.0.0.1:{port}/readyz")
            break
        except OSError:
            time.sleep(0.5)
    asked = json.dumps({"prompt": "a red circle", "size": "64x64"}).encode()
    request = Request(f"http://127.0.0.1:{port}/v1/images/generations", asked, {"Content-Type": "application/json"})
    assert json.load(urlopen(request, timeout=120))["data"][0]["b64_json"]
finally:
    server.terminate()
    server.wait()
"""
# What runs with nothing else installed: commands, or a name and a script where no command does it. The recipes that
# they name are made by `recipes`.
FEATURES = {
    "": [
        f"generate 'a red circle' --model tiny {TINY} --output a.png",
        f"edit 'make it blue' --image a.png --model tiny {TINY} --output b.png",
        "inspect tiny",
        "doctor",
    ],
    "train": [
        "data preview --recipe tiny --count 2",
        "train folder.yaml --out out/folder",
        "train words.yaml --out out/words",
        "cache-latents words.yaml --out out/cache --count 4",
        "train vae.yaml --out out/vae",
    ],
    "train,optimizers": [
        "train words.yaml optimizer.name=prodigy optimizer.lr=1 --out out/prodigy",
        "train words.yaml optimizer.name=adamw8bit --out out/adamw8bit",
    ],
    "evaluate": [
        "evaluate text --count 1 --steps 1 --size 64 --out out/text",
        "evaluate edit --count 1 --steps 1 --out out/edit",
    ],
    "data": [
        "data filter filter.yaml --out out/filtered",
        "data report out/filtered",
        "data preview --recipe tiny --count 2",
    ],
    "diffusers": [("the drop-in and a PEFT adapter", DROP_IN)],
    "serve": [("a picture over HTTP", SERVE)],
    "train,ray": ["train ray.yaml --out out/ray"],
    "data,retrieve": ["data retrieve retrieve.yaml --out out/retrieved"],
}
SMALL = {"steps": 2, "batch": 2, "log": {"every": 1}, "checkpoint": {"every": 2}, "device": "cpu"}
FLOW = {**SMALL, "kind": "flow", "model": {"folder": "tiny"}}


def recipes(folder: Path) -> None:
    """The files that the commands name; JSON is YAML."""
    from PIL import Image

    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(3):
        gradient = Image.linear_gradient("L").rotate(90 * number).resize((320, 320))
        Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)]).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"gradient number {number}", encoding="utf-8")
    words = {**FLOW, "data": {"source": "synthesis", "options": {"preset": "tiny", "size": 64}, "buckets": [[64, 64]]}}
    files = {
        "folder": {**FLOW, "data": {"source": str(pictures), "buckets": [[64, 64]]}},
        "words": words,
        "vae": {**SMALL, "kind": "vae", "data": {"source": "squares", "buckets": [[64, 64]]}},
        "ray": {**words, "producers": {"backend": "ray", "count": 1}},
        "filter": {"sources": [{"path": str(pictures)}], "stages": [1, 2, 3, 5]},
        "retrieve": {"sources": [{"path": str(pictures)}], "model": "tiny", "gaps": [{"node": "number 2", "count": 1}]},
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")


def check(extra: str, wheel: Path, work: Path) -> dict[str, object]:
    """Seconds of installation, and the last line of what failed, by feature."""
    place = Path(tempfile.mkdtemp(prefix="extra-", dir=work))
    python = place / "venv" / "bin" / "python"
    try:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, wanted], check=True)
        found: dict[str, object] = {"installation seconds": round(time.perf_counter() - start)}
        env = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
        subprocess.run([python, "-c", f"from tests.extras.__main__ import *; recipes(Path({str(place)!r}))"],
                       check=True, cwd=ROOT, env=env)  # fmt: skip
        for feature in FEATURES[extra]:
            name, script = feature if isinstance(feature, tuple) else (feature, None)
            own = ["-c", script] if script else ["-m", "qwen_image_fast", *shlex.split(name)]
            ran = subprocess.run([python, *own], cwd=place, env=env, capture_output=True, text=True, errors="replace")
            last = (ran.stderr.strip() or "no word").splitlines()[-1]
            found[name] = "runs" if ran.returncode == 0 else f"exit code {ran.returncode}: {last}"
            print(f"{extra or 'no extra'}: {name}: {found[name]}", flush=True)
        return found
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("extras", nargs="*", help="all, where none is named; none: no extra")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULTS, help="a JSON file for the results")
    options = parser.parse_args()
    chosen = [{"none": ""}.get(extra, extra) for extra in options.extras] or list(FEATURES)
    found: dict[str, dict[str, object]] = {}
    if options.out.exists():  # of other extras
        found = json.loads(options.out.read_text(encoding="utf-8"))["extras"]
    for extra in chosen:
        found[extra or "no extra"] = check(extra, options.wheel.resolve(), options.work)
        report = {"date": datetime.date.today().isoformat(), "python": sys.version.split()[0], "extras": found}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    bad = failures(found)
    print("\n".join(["failed:", *bad]) if bad else "every extra suffices")
    return int(bool(bad))


def failures(found: dict[str, dict[str, object]]) -> list[str]:
    """What did not run, of all extras."""
    return [
        f"{extra}: {name}: {said}" for extra, own in found.items() for name, said in own.items()
        if name != "installation seconds" and said != "runs"
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
