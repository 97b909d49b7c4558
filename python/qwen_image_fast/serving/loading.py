"""A model becomes an engine: read, given its LoRAs, tried once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import qwen_image_fast
from qwen_image_fast.folders import resolve_folder
from qwen_image_fast.model_defaults import generation_of, model_class
from qwen_image_fast.models.stored_modulation import is_stored
from qwen_image_fast.models.vae_conv import packed_bytes
from qwen_image_fast.parallel.leader import Leader
from qwen_image_fast.parallel.tiles import TileLeader
from qwen_image_fast.picture_memory import PictureMemory
from qwen_image_fast.pipelines.residence import packed_of
from qwen_image_fast.request import Request, make
from qwen_image_fast.serving.adapters import Registered
from qwen_image_fast.serving.engine import Engine, Limits
from qwen_image_fast.serving.followers import Lines, Place, join_group
from qwen_image_fast.serving.messages import Event, Failed, Finished, Task
from qwen_image_fast.serving.settings import Model
from qwen_image_fast.serving.threads import use_threads
from qwen_image_fast.weights.memory import free_bytes


def load(
    model: Model,
    on_event: Callable[[Event], None],
    others: Sequence[Lines] = (),
    place: Place | None = None,
) -> tuple[Engine, dict[str, Any]]:
    """A running engine that has made one picture, and what requests need to know of its model.

    others, place: the processes that compute with this one (followers.py).
    """
    folder = resolve_folder(model.name)
    name = model_class(folder, model.name)
    generation = generation_of(folder, name)
    parts: dict[str, Any] = {"precision": model.precision}
    parts |= {"transformer": model.transformer} if model.transformer else {}
    pipe = getattr(qwen_image_fast, name).from_pretrained(
        model.name, torch_dtype=getattr(torch, model.dtype), device=model.device, **parts
    )
    use_threads(model, pipe.transformer)
    loras = Registered(pipe, model.loras)
    if model.vae_tiling:
        pipe.vae.enable_tiling()
        pipe.vae.ranks = TileLeader([lines.tiles for lines in others]) if others else None
    if place is not None:
        ranks = join_group(model, place)
        pipe.transformer.ranks = Leader(ranks, [lines.waves for lines in others], lambda: loras.active("transformer"))
    net_class: Any = qwen_image_fast.QwenImageControlNetModel
    kind: dict[str, Any] = {"torch_dtype": pipe.dtype, "device": model.device}
    nets = {name: net_class.from_pretrained(source, **kind) for name, source in model.controlnets.items()}
    made: dict[Any, Any] = {}

    def pipeline(request: Request) -> Any:
        found, net = request.pipeline(name), getattr(request, "net", None)
        if (found, net) not in made:
            cls = getattr(qwen_image_fast, found)
            more = {} if net is None else {"controlnet": nets[net]}
            made[found, net] = pipe if isinstance(pipe, cls) else cls.from_pipe(pipe, **more)
        return made[found, net]

    first = _First(on_event)
    engine = Engine(
        pipe, first.event, pipelines=pipeline, loras=loras, limits=Limits(wave_tokens=model.wave_tokens)
    )  # fmt: skip
    engine.start()
    if name != "QwenImageLayeredPipeline" and not is_stored(pipe.transformer):
        engine.submit(Task(_First.ID, make("text", {"prompt": "a red circle", "model": model.name, "size": "64x64",
                                                    "steps": 2, "cfg": 1.0, "seed": 0})))  # fmt: skip
        first.wait()
    offered = [] if engine.stored is None else engine.stored.offered()
    generation = generation if engine.stored is None else engine.stored.usual(generation)
    vae = pipe.vae  # the first picture made its decoder's transformed weights, if there was one
    packed = packed_of(dict(vae.named_parameters()), vae.dtype, pipe.device, True) - packed_bytes(vae)
    about = {
        "class": name,
        "generation": generation.model_dump(exclude_none=True),
        "schedules": offered,  # of a transformer without modulation weights; else none, and any schedule is drawn
        "loras": loras.names,
        "controlnets": list(nets),
        "cost": (engine.cost.per_token, engine.cost.per_pair),
        "enough_rows": engine.enough_rows,
        "device": model.device,
        "dtype": model.dtype,
        "precision": model.precision,
        "threads": torch.get_num_threads(),
        "parallel": str(model.split),
        "memory": tuple(
            PictureMemory.of(
                pipe.transformer.config, vae.config, pipe.dtype.itemsize, tiles=model.vae_tiling, kept=max(0, packed)
            )
        ),
        "free": free_bytes(pipe.device),
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
