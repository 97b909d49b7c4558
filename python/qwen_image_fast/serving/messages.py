"""What goes between an engine and whoever asks it: requests in, events out. All can be pickled; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qwen_image_fast.request import Request


@dataclass
class Task:
    """One request: the description of the pictures, its opened pictures, and how it is to be treated.

    loras: registered names and weights. priority: see fair_queue.py. tenant: whose it is. previews: how many pictures
    of the way are wanted; `every_step`: one after each step instead.
    """

    id: str
    request: Request
    opened: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, float] = field(default_factory=dict)
    priority: int = 0
    tenant: str = ""
    previews: int = 0
    every_step: bool = False


class Began(NamedTuple):
    """It left the queue, `seconds` after it came."""

    id: str
    seconds: float


class Stepped(NamedTuple):
    """`step` of `steps` are taken; left: seconds until all are, about. preview: uint8 [H/8, W/8, 3] of each picture."""

    id: str
    step: int
    steps: int
    left: float
    preview: list[np.ndarray] | None = None
    number: int | None = None  # of the preview, from 0


class Usage(NamedTuple):
    """Tokens: of the text, of reference pictures, of all that was made."""

    text: int
    image: int
    output: int


class Finished(NamedTuple):
    """images: a list for each picture that was asked for, with one entry, or its layers. seconds: of every stage."""

    id: str
    images: list[list[Image.Image]]
    seeds: list[int | None]
    prompts: list[str]
    seconds: dict[str, float]
    usage: Usage


class Failed(NamedTuple):
    """kind: "invalid" (the request's fault), "memory", "error" or "crashed" (the engine's process ended)."""

    id: str
    sentence: str
    kind: str


class Cancelled(NamedTuple):
    id: str
    reason: str


class WaveRan(NamedTuple):
    """One wave; cost: by cost.py. load: requests waiting, being encoded, running, being decoded."""

    seconds: float
    tokens: int
    requests: int
    cost: float
    waiting: int
    running: int


class Alive(NamedTuple):
    """Sent every second. memory: bytes by kind. rate: cost per second of recent waves, 0 before the first."""

    memory: dict[str, int]
    waiting: int
    running: int
    rate: float


class Ready(NamedTuple):
    """The model is loaded and has made a picture. about: the class of the model, its types and limits."""

    about: dict[str, Any]


Event = Began | Stepped | Finished | Failed | Cancelled | WaveRan | Alive | Ready
