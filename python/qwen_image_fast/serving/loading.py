"""A model becomes an engine: read, given its LoRAs, tried once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

import qwen_image_fast
from qwen_image_fast.folders import resolve_folder
from qwen_image_fast.model_defaults import generation_of, model_class
from qwen_image_fast.request import Request, make
from qwen_image_fast.serving.adapters import Registered
from qwen_image_fast.serving.engine import Engine, Limits
from qwen_image_fast.serving.messages import Event, Failed, Finished, Task
from qwen_image_fast.serving.settings import Model

# Models as narrow as this one are fastest on one thread: a second one costs more to wake than it does.
NARROW = 384


def load(model: Model, on_event: Callable[[Event], None]) -> tuple[Engine, dict[str, Any]]:
    """A running engine that has made one picture, and what requests need to know of its model."""
    folder = resolve_folder(model.name)
    name = model_class(folder, model.name)
    generation = generation_of(folder, name)
    load_class = name if name != "QwenImagePipeline" else "QwenImagePipeline"
    parts = {"transformer": model.transformer} if model.transformer else {}
    pipe = getattr(qwen_image_fast, load_class).from_pretrained(
        model.name, torch_dtype=getattr(torch, model.dtype), device=model.device, **parts
    )
    config = pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    if model.threads is not None or (width < NARROW and model.device == "cpu"):
        torch.set_num_threads(model.threads or 1)
    loras = Registered(pipe, model.loras)
    made: dict[str, Any] = {}

    def pipeline(request: Request) -> Any:
        found = request.pipeline(name)
        if found not in made:
            cls = getattr(qwen_image_fast, found)
            made[found] = pipe if isinstance(pipe, cls) else cls.from_pipe(pipe)
        return made[found]

    first = _First(on_event)
    engine = Engine(
        pipe, first.event, pipelines=pipeline, loras=loras, limits=Limits(wave_tokens=model.wave_tokens)
    )  # fmt: skip
    engine.start()
    if name != "QwenImageLayeredPipeline":
        engine.submit(Task(_First.ID, make("text", {"prompt": "a red circle", "model": model.name, "size": "64x64",
                                                    "steps": 2, "cfg": 1.0, "seed": 0})))  # fmt: skip
        first.wait()
    about = {
        "class": name,
        "generation": generation.model_dump(exclude_none=True),
        "loras": loras.names,
        "cost": (engine.cost.per_token, engine.cost.per_pair),
        "enough_rows": engine.enough_rows,
        "device": model.device,
        "dtype": model.dtype,
        "threads": torch.get_num_threads(),
    }
    return engine, about


class _First:
    """The events of an engine but those of its first picture, which is nobody's."""

    ID = "first"

    def __init__(self, on_event: Callable[[Event], None]):
        self._on_event, self._done, self._failed = on_event, threading.Event(), ""

    def event(self, event: Event) -> None:
        if getattr(event, "id", None) != self.ID:
            self._on_event(event)
        elif isinstance(event, (Finished, Failed)):
            self._failed = event.sentence if isinstance(event, Failed) else ""
            self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._failed:
            raise RuntimeError(f"the model could not make a first picture: {self._failed}")
