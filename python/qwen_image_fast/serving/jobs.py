"""A request as its clients see it, and results that are kept for a while."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_image_fast.serving.errors import ApiError
from qwen_image_fast.serving.fields import Fields
from qwen_image_fast.serving.messages import Finished, Task

QUEUED, GENERATING, COMPLETED, FAILED, CANCELLED = "queued", "generating", "completed", "failed", "cancelled"
TOMBSTONES = 10_000  # ids that are remembered as expired


def new_id() -> str:
    """128 random bits."""
    return f"img_{secrets.token_hex(16)}"


@dataclass(eq=False)
class Job:
    """owner: the name of the key that asked, which alone may see it. cost: by cost.py. input_bytes: of its pictures.
    kept: whether somebody may ask for it once it is over."""

    task: Task
    fields: Fields
    cost: float
    owner: str = ""
    input_bytes: int = 0
    kept: bool = False
    created: float = field(default_factory=time.time)
    began: float | None = None
    status: str = QUEUED
    step: int = 0
    steps: int = 0
    left: float | None = None
    previews: dict[int, list[np.ndarray]] = field(default_factory=dict)
    finished: Finished | None = None
    files: list[bytes] = field(default_factory=list)
    answer: dict[str, Any] | None = None
    error: ApiError | None = None
    first_preview: float | None = None
    changes: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.task.id

    @property
    def over(self) -> bool:
        return self.status in (COMPLETED, FAILED, CANCELLED)

    @property
    def size(self) -> int:
        """Bytes that it keeps once it is over."""
        return sum(map(len, self.files))

    @property
    def remaining(self) -> float:
        """Of its cost."""
        return 0.0 if self.over else self.cost * (1 - self.step / self.steps if self.steps else 1.0)

    def change(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, seen: int, seconds: float | None = None) -> bool:
        """Until something has changed since `seen` changes; False where nothing did in that time."""
        if self.changes != seen or self.over:
            return True
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    def shown(self, position: int | None) -> dict[str, Any]:
        """As /v1/jobs/{id} tells it."""
        found: dict[str, Any] = {
            "id": self.id, "object": "image.job", "status": self.status, "created_at": int(self.created),
            "step": self.step, "steps": self.steps or self.task.request.steps_taken, "queue_position": position,
            "eta_s": None if self.left is None or self.over else round(self.left, 2), "poll_url": f"/v1/jobs/{self.id}",
        }  # fmt: skip
        if self.answer is not None:
            found["result"] = self.answer
        if self.error is not None:
            found["error"] = self.error.body["error"]
        return found


class Store:
    """Jobs that are over, the oldest leaving first: those of more than `seconds`, and beyond `bytes` in all."""

    def __init__(self, bytes: int, seconds: float):
        self.limit, self.seconds = bytes, seconds
        self.bytes = 0
        self._jobs: OrderedDict[str, tuple[float, Job]] = OrderedDict()
        self._gone: OrderedDict[str, None] = OrderedDict()

    def keep(self, job: Job) -> None:
        self._jobs[job.id] = (time.monotonic(), job)
        self.bytes += job.size
        self.expire()

    def get(self, id: str) -> Job | None:
        """ApiError 410 where it was here; None where it never was."""
        self.expire()
        if id in self._jobs:
            return self._jobs[id][1]
        if id in self._gone:
            raise ApiError(410, f"the result of {id} has expired", "expired")
        return None

    def expire(self) -> None:
        now = time.monotonic()
        while self._jobs:
            id, (since, job) = next(iter(self._jobs.items()))
            if now - since <= self.seconds and self.bytes <= self.limit:
                return
            del self._jobs[id]
            self.bytes -= job.size
            self._gone[id] = None
            while len(self._gone) > TOMBSTONES:
                self._gone.popitem(last=False)
