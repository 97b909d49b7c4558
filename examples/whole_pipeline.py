"""From pictures to a trained and scored model, offline, in one command.

Collect, filter, annotate, synthesise, balance, produce, train, sample, score:

    python examples/whole_pipeline.py            # minutes on two cores; everything is in outputs/pipeline
    python examples/whole_pipeline.py --small    # the same steps, smaller

The captioner is a stub at a local address, which answers as a vision-language model would. Two processes train, through
two stages of a curriculum, the tiny model that comes with the package: each holds half of the weights (FSDP2) and has a
producer, a process that makes its batches with the VAE.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageFilter

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.training.data.annotate import annotate
from qwen_image_fast.training.data.cli import filter_command
from qwen_image_fast.training.data.recipe import AnnotateRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.report import write_report
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.evaluation import evaluate_text
from qwen_image_fast.training.evaluation.cases import held_out_cases
from qwen_image_fast.training.evaluation.ocr import Reader
from qwen_image_fast.training.synthesis import stream, tiny
from qwen_image_fast.training.synthesis.photos import find_photos, open_photo

SIDE = 256


def collect(folder: Path, crops: int) -> None:
    """Crops of photographs with a caption each, and four that a filter should find: blurred, dark, twice, cut off."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def keep(name: str, picture: Image.Image, caption: str) -> bytes:
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
        return (folder / f"{name}.png").read_bytes()

    for path, subject, _ in find_photos(None):
        photo = open_photo(path).convert("RGB")
        name = Path(path).stem
        for i in range(crops):
            left, top = (int(rng.integers(0, side - SIDE + 1)) for side in photo.size)
            crop = photo.crop((left, top, left + SIDE, top + SIDE))
            content = keep(f"{name}-{i}", crop, f"a detail of a photograph of {subject}")
    cat = next(open_photo(path) for path, _, _ in find_photos(None) if "chelsea" in path).convert("RGB")
    keep("blurred", cat.transpose(0).filter(ImageFilter.GaussianBlur(4)), "a photograph that is out of focus")
    keep("dark", crop.point(lambda value: value // 20), "a photograph taken in the dark")
    keep("twice", crop, "a photograph that is there twice")
    keep("cut-off", crop, "a photograph that is cut off")
    (folder / "cut-off.png").write_bytes(content[:5000])


class Captioner(BaseHTTPRequestHandler):
    """The stub: a caption by the brightness of the picture, in the form that is asked for."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        url = body["messages"][1]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            light = "bright" if np.asarray(image.convert("L")).mean() > 127 else "dim"
        answer = {"caption": f"A {light} photograph with many details, taken by day.", "image_type": "photograph",
                  "image_style": "realistic", "watermarks": [], "abnormal_element": False, "texts": []}  # fmt: skip
        content = json.dumps({"choices": [{"message": {"content": json.dumps(answer)}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def captioner() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Captioner)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def synthesise(folder: Path, count: int) -> None:
    """Pictures of words, as shards."""

    def records() -> Iterator[Record]:
        for number, made in enumerate(stream(tiny(64), 0, count=count)):
            file = io.BytesIO()
            Image.fromarray(made.image).save(file, "PNG")
            yield Record(file.getvalue(), {"raw": made.caption}, "synthesis", category="Synthetic", origin=f"{number}")

    write_shards(records(), folder)


def recipe_file(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")  # JSON is YAML
    return path


def curriculum(shards: Path, steps: int) -> dict:
    photos = {"name": "photos", "source": str(shards), "options": {"where": {"category": ["Nature"]}}}
    words = {"name": "words", "source": str(shards), "options": {"where": {"category": ["Synthetic"]}}, "weight": 3}
    return {
        "name": "whole-pipeline", "device": "cpu", "batch": 8, "model": {"folder": str(SHIPPED)},
        "parallel": {"dp_shard": 2}, "producers": {"backend": "processes", "count": 1, "ahead": 8},
        "optimizer": {"lr": 1e-4, "ema": 0.9}, "checkpoint": {"every": steps}, "log": {"every": max(1, steps // 4)},
        "stages": [
            {"name": "photographs at 32 px", "steps": steps, "data": {"mixture": [photos], "buckets": [[32, 32]]}},
            {"name": "photographs and words at 64 px", "steps": steps,
             "data": {"mixture": [photos, words], "buckets": [[64, 64]]}},
        ],
    }  # fmt: skip


def train(recipe: Path, out: Path) -> None:
    """As a shell would: torchrun --standalone --nproc-per-node 2 -m qwen_image_fast.training RECIPE --out OUT."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, "-m", "qwen_image_fast.training", str(recipe), "--out", str(out)], check=True)


def main(
    out: Annotated[Path, typer.Option(help="A folder that is not there yet.")] = Path("outputs/pipeline"),
    small: Annotated[bool, typer.Option("--small", help="Fewer pictures and steps.")] = False,
    engine: Annotated[str, typer.Option(help="Of the filters: local, or ray.")] = "local",
) -> None:
    """Run every step and print how long it took."""
    if out.exists():
        raise typer.BadParameter(f"--out must be a folder that is not there yet, got {out}")
    crops, words, steps, cases = (2, 12, 2, 2) if small else (8, 200, 40, 24)
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def done(step: str) -> None:
        nonlocal began
        seconds[step] = round(time.perf_counter() - began, 1)
        began = time.perf_counter()
        print(f"== {step}: {seconds[step]} s", flush=True)

    out.mkdir(parents=True)
    collect(out / "pictures", crops)
    done("collect")
    screening = {"sources": [{"path": str(out / "pictures"), "category": "Nature"}], "stages": [1, 2, 3],
                 "without": ["nsfw", "near_duplicate"], "quality": {"min_entropy": 1.0}}  # fmt: skip
    filter_command(recipe_file(out / "filter.yaml", screening), (), out / "filtered", engine=engine)
    done("filter")
    with captioner() as endpoint:
        source = SourceRecipe(str(out / "filtered" / "shards"))
        result = annotate(AnnotateRecipe([source], endpoint=endpoint, model="stub"), out / "annotated")
    print(f"{result.annotated} of {result.seen} annotated")
    done("annotate")
    synthesise(out / "synthetic", words)
    done("synthesise")
    balancing = {"sources": [{"path": str(out / "annotated" / "shards")}, {"path": str(out / "synthetic")}],
                 "stages": [1, 6, 7], "without": ["nsfw", "near_duplicate"],
                 "curation": {"min_side": 32, "min_bytes": 1},
                 "balance": {"categories": {"Nature": 0.5, "Synthetic": 0.5}}}  # fmt: skip
    filter_command(recipe_file(out / "balance.yaml", balancing), (), out / "balanced", engine=engine)
    done("balance")
    report = write_report(out / "filtered")
    done("report")
    recipe = recipe_file(out / "curriculum.yaml", curriculum(out / "balanced" / "shards", steps))
    train(recipe, out / "run")
    done("produce and train")
    drawn, pipe = tiny(64, split="held_out"), QwenImagePipeline.from_pretrained(out / "run" / "model")
    draw = evaluate_text.drawn_by(pipe, height=64, width=64, num_inference_steps=8, true_cfg_scale=1.0)
    results = list(evaluate_text.evaluate(draw, held_out_cases(drawn, cases), drawn, Reader()))
    print(evaluate_text.table(evaluate_text.write_report(results, out / "scores", {"size": 64, "steps": 8})))
    done("sample and score")
    (out / "seconds.json").write_text(json.dumps(seconds, indent=2), encoding="utf-8")
    print(f"{sum(seconds.values()):.0f} s in all; the report is {report}, the scores are in {out / 'scores'}")


if __name__ == "__main__":
    typer.run(main)
