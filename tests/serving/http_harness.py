"""A server in a thread, around an engine in this process."""

import threading
import time

import httpx
import openai
import uvicorn

from qwen_image_fast.serving.app import Server
from qwen_image_fast.serving.engine import Engine, Limits
from qwen_image_fast.serving.messages import Alive, Ready
from qwen_image_fast.serving.run import configuration, listen
from qwen_image_fast.serving.settings import Model, Settings


class Inside:
    """What stands for the engine's process in most tests: an engine in this one, around the same models."""

    models = None

    def __init__(self, model, on_event, on_end):
        self.engine = Engine(
            self.models.pipe, on_event, pipelines=self.models.pipeline, loras=self.models.loras,
            limits=Limits(wave_tokens=model.wave_tokens),
        )  # fmt: skip
        self.engine.start()
        self.submit, self.cancel = self.engine.submit, self.engine.cancel
        cost = self.engine.cost
        on_event(Ready({
            "class": type(self.models.pipe).__name__,
            "generation": {"width": 128, "height": 128, "steps": 20, "cfg": 1.0},
            "loras": self.models.loras.names, "cost": (cost.per_token, cost.per_pair),
            "controlnets": list(self.models.nets), **self.models.about,
        }))  # fmt: skip
        self.ended = threading.Event()

        def live():
            while not self.ended.wait(1):
                on_event(Alive({"host": 1}, *self.engine.load, self.engine.rate))

        threading.Thread(target=live, daemon=True).start()

    def end(self):
        self.ended.set()
        self.engine.end()


class Running:
    """A server that listens on the loopback, in a thread."""

    def __init__(self, models, **options):
        limits = options.pop("limits", {})
        kind = options.pop("start", None) or type("Inside", (Inside,), {"models": models})
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        model = {"wave_tokens": options.pop("wave_tokens", 2048), **options.pop("model", {})}
        self.settings = Settings(
            model=Model(name="tiny", names=["gpt-image-2"], **model),
            port=self.port, limits=limits, **options,
        )  # fmt: skip
        self.server = Server(self.settings, kind)
        self.uvicorn = uvicorn.Server(configuration(self.server.app))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        until = time.monotonic() + 60
        while self.http.get("/readyz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.02)

    def client(self, key="none", retries=0):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=60)

    def end(self):
        self.http.close()
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
