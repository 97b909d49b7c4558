"""Short runs of what comes after training, on the small model: coloured squares, rewarded by a function of pixels."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image
from trainer_helpers import small_recipe

from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.recipe.curriculum import one_stage
from qwen_image_fast.training.sources.survey import sources_of
from qwen_image_fast.training.tasks.post import PostTask

BRIGHT = [{"kind": "function", "options": {"name": "post_helpers:bright"}}]
# What each kind is tested with beside what all have.
KINDS = {
    "sft": {"best": 1, "least": -1e9},
    "dpo": {"margin": 0.0},
    "grpo": {"window": 2, "within": 2, "kl": 0.1},
    "nft": {"levels": 2},
    "awm": {"self_anchor": 1.0, "anchor": 0.01},
}


def bright(pictures, asked):
    """The mean of a picture: any two differ."""
    assert len(pictures) == len(asked)
    return [float(np.mean(picture)) for picture in pictures]


def post_recipe(folder, kind, /, **changes):
    """Two rounds of three updates, four prompts of three pictures each."""
    common = {
        "kind": kind, "steps": 6, "batch": 3, "model__train_text_encoder": False, "optimizer__ema": 0.0,
        "optimizer__lr": 1e-3, "rewards": BRIGHT, "guards": {"every": 0}, "rollout__count": 4, "rollout__group": 3,
        "rollout__updates": 3, "rollout__steps": 3, "data__text_dropout": 0.0,
    }  # fmt: skip
    return small_recipe(folder, **{**common, **KINDS[kind], **changes})


def post_task(recipe, folder):
    return PostTask(recipe, folder, sources=sources_of(one_stage(recipe)))


def start_post(recipe, folder, **options):
    return Trainer(recipe, post_task(recipe, folder), folder, **options)


class JudgeServer(ThreadingHTTPServer):
    """Scores a picture by its mean; from request `silent_from` on it says nothing until it is closed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.asked, self.silent_from, self.over = 0, 1000, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class JudgeHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.asked >= self.server.silent_from:
            self.server.over.wait()
            return
        self.server.asked += 1
        (url,) = [part["image_url"]["url"] for part in asked["messages"][-1]["content"] if part["type"] == "image_url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
            score = float(np.asarray(picture).mean())
        content = json.dumps({"choices": [{"message": {"content": json.dumps({"score": score})}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
