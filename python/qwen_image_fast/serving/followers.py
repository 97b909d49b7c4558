"""The processes that compute beside an engine's own, each with the transformer on a GPU of its own."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tqdm import tqdm

from qwen_image_fast.parallel.split import Split
from qwen_image_fast.serving.settings import Model

PATIENCE = 1800.0  # seconds for the others to read the model


class Place(NamedTuple):
    """A process among those of an engine. file: in which they find each other."""

    rank: int
    split: Split
    file: str


class Lines(NamedTuple):
    """Pipes between an engine's process and one that follows it. waves: of the transformer; tiles: of the VAE."""

    waves: Connection
    tiles: Connection


def device_of(model: Model, place: Place) -> str:
    """GPUs one after another, from the one that is named."""
    if not model.device.startswith("cuda"):
        return model.device
    _, _, first = model.device.partition(":")
    return f"cuda:{int(first or 0) + place.rank}"


def join_group(model: Model, place: Place) -> Any:
    """The ranks of an engine; every one of its processes calls this once."""
    import torch

    from qwen_image_fast.parallel.ranks import make_ranks
    from qwen_image_fast.parallel.world import join

    where = {"init_method": f"file://{place.file}", "rank": place.rank, "world_size": place.split.ranks}
    join(torch.device(device_of(model, place)), PATIENCE, **where)
    return make_ranks(place.split)


def begin_process() -> None:
    """What a process of an engine does first, which ends by os._exit, or is killed.

    Signals are the server's to heed. tqdm's own lock has a semaphore of the system inside, which such a process would
    leave for multiprocessing's resource tracker to complain about: its bars are locked among its threads alone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())


def follow(model: Model, place: Place, lines: Lines) -> None:
    """A process that follows the engine's: reads the transformer and its LoRAs, and the VAE where that works in tiles;
    ends with the engine."""
    begin_process()
    import torch

    import qwen_image_fast
    from qwen_image_fast.parallel import leader
    from qwen_image_fast.serving.adapters import Registered
    from qwen_image_fast.serving.threads import use_threads

    parts: dict[str, Any] = {} if model.vae_tiling else {"vae": None}
    parts |= {"transformer": model.transformer} if model.transformer else {}
    pipe = qwen_image_fast.QwenImagePipeline.from_pretrained(
        model.name, torch_dtype=getattr(torch, model.dtype), device=device_of(model, place), text_encoder=None,
        tokenizer=None, precision=model.precision, **parts,
    )  # fmt: skip
    use_threads(model, pipe.transformer)
    loras = Registered(pipe, model.loras)
    if model.vae_tiling:
        threading.Thread(target=_share_tiles, args=(pipe.vae, lines.tiles), name="tiles", daemon=True).start()
    ranks = join_group(model, place)
    with torch.inference_mode():
        leader.follow(pipe.transformer, ranks, lines.waves, lambda wanted: loras.activate(wanted, "transformer"))
    os._exit(0)  # the engine is gone


def _share_tiles(vae: Any, connection: Connection) -> None:
    """A thread of such a process, which ends with it."""
    import torch

    from qwen_image_fast.parallel.tiles import follow_tiles

    try:
        with torch.inference_mode():
            follow_tiles(vae, connection)
    finally:
        os._exit(0)  # the engine is gone, or this process must not be waited for
