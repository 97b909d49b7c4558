"""A request as its clients see it, and results that are kept for a while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.files import atomic_write
from qwen_image_fast.serving.errors import ApiError
from qwen_image_fast.serving.fields import Fields
from qwen_image_fast.serving.messages import Finished, Task

logger = logging.getLogger("qwen_image_fast.serving")
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
    files: list[Stored] = field(default_factory=list)
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
        return sum(picture.size for picture in self.files)

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


class Stored:
    """A picture of a result, in memory or in a file."""

    def __init__(self, content: bytes):
        self.size, self._content = len(content), content
        self._path: Path | None = None

    def read(self) -> bytes:
        """ApiError 410 where somebody has removed the file."""
        if self._path is None:
            return self._content
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise ApiError(410, f"the result has gone from the disk: {error.strerror}", "expired") from error

    def move(self, path: Path) -> None:
        """Into a file. OSError: it could not be written, and stays in memory."""
        atomic_write(path, lambda file: file.write(self._content))
        self._content, self._path = b"", path

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Store:
    """Jobs that are over, the oldest leaving first: those of more than `seconds`, and beyond `bytes` in all.

    folder: where their pictures lie; None: in memory. What a server that was killed left there leaves at the start.
    """

    def __init__(self, bytes: int, seconds: float, folder: Path | None = None):
        self.limit, self.seconds, self.folder = bytes, seconds, folder
        self.bytes = 0
        self._jobs: OrderedDict[str, tuple[float, Job]] = OrderedDict()
        self._gone: OrderedDict[str, None] = OrderedDict()
        for path in [] if folder is None else folder.glob("img_*-*"):
            with contextlib.suppress(OSError):  # another server of this folder may be faster
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()

    def write(self, job: Job) -> None:
        """Put the pictures of a job into the folder, from any thread. On a full disk they stay in memory, and within
        the same limit."""
        try:
            for k, picture in enumerate(job.files if self.folder is not None and job.kept else []):
                assert self.folder is not None
                picture.move(self.folder / f"{job.id}-{k}.{job.fields.output_format}")
        except OSError as error:
            told = {"id": job.id, "folder": str(self.folder), "why": error.strerror or str(error)}
            logger.warning("a result could not be written and stays in memory", extra={"fields": told})

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
            self._drop(id, job)
            self._gone[id] = None
            while len(self._gone) > TOMBSTONES:
                self._gone.popitem(last=False)

    def clear(self) -> None:
        """The server ends: its ids mean nothing to another one."""
        for id, (_, job) in list(self._jobs.items()):
            self._drop(id, job)

    def _drop(self, id: str, job: Job) -> None:
        del self._jobs[id]
        self.bytes -= job.size
        for picture in job.files:
            picture.remove()
