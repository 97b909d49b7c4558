"""Between HTTP and the engine: who may come in, what became of it, and a new engine where one has ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from qwen_image_fast.model_defaults import Generation
from qwen_image_fast.picture_memory import PictureMemory
from qwen_image_fast.serving.cost import StepCost, samples_of
from qwen_image_fast.serving.errors import ApiError, of_cancelled, of_failure
from qwen_image_fast.serving.jobs import CANCELLED, COMPLETED, FAILED, GENERATING, QUEUED, Job, Store
from qwen_image_fast.serving.messages import (
    Alive,
    Began,
    Cancelled,
    Event,
    Failed,
    Finished,
    Ready,
    Stepped,
    WaveRan,
)
from qwen_image_fast.serving.metrics import Metrics
from qwen_image_fast.serving.process import EngineProcess
from qwen_image_fast.serving.settings import Settings

logger = logging.getLogger("qwen_image_fast.serving")
SILENCE = 10.0  # seconds without a word of the engine, after which it is not ready
INTERNALS = ("cost", "enough_rows", "memory", "free")  # of what a model is, what only sums are made of
PAUSES = (0.0, 1.0, 5.0, 30.0)  # before it is started again, growing while it does not become ready


class Desk:
    """Runs in the event loop; everything here is called from it."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        finish: Callable[[Job], Any],
        start: Callable[..., Any] = EngineProcess,
    ):
        """`finish`: a coroutine that makes the answer of a job whose pictures are there."""
        self.settings, self.metrics, self._finish, self._start = settings, metrics, finish, start
        self.store = Store(settings.limits.store_bytes, settings.limits.store_seconds, settings.store_folder)
        self.jobs: dict[str, Job] = {}
        self.about: dict[str, Any] | None = None
        self.engine: Any = None
        self.draining = self.ended = False
        self.rate, self._spoke, self._attempts = 0.0, 0.0, 0
        self._tasks: set[asyncio.Task] = set()
        self.why = "the model is being loaded"
        self.on_ready: Callable[[], None] = lambda: None  # called whenever an engine is ready

    # ---- the engine ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        loop = asyncio.get_running_loop()
        number = self._attempts = self._attempts + 1

        def on_event(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._on_event, event)

        def on_end(code: int | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._on_end, number, code)

        self._spoke = time.monotonic()
        self.engine = self._start(self.settings.model, on_event, on_end)

    async def end(self) -> None:
        self.ended = True
        if self.engine is not None:
            await asyncio.to_thread(self.engine.end)
        for task in list(self._tasks):
            task.cancel()
        self.store.clear()

    @property
    def is_ready(self) -> bool:
        return self.about is not None and not self.draining and time.monotonic() - self._spoke < SILENCE

    @property
    def gave_up(self) -> bool:
        """Whether the engine ended again and again before it was ready; it is started all the same."""
        return self.about is None and self._attempts > len(PAUSES)

    @property
    def schedules(self) -> list[dict[str, int]]:
        """All that there are, where the transformer has no modulation weights (`StoredLevels.offered`)."""
        return list((self.about or {}).get("schedules", []))

    @property
    def generation(self) -> Generation:
        return Generation.model_validate((self.about or {}).get("generation", {}))

    @property
    def loras(self) -> list[str]:
        return list((self.about or {}).get("loras", []))

    @property
    def controlnets(self) -> list[str]:
        return list((self.about or {}).get("controlnets", []))

    @property
    def model_class(self) -> str:
        return (self.about or {}).get("class", "")

    # ---- jobs ---------------------------------------------------------------------------------------------------

    def cost(self, request, opened) -> float:
        per_token, per_pair = (self.about or {"cost": (1.0, 0.0)})["cost"]
        return StepCost(per_token, per_pair).request(request, opened)

    def expected_wait(self) -> float:
        """Seconds until all that is here is done; 0 where it is not known yet."""
        return sum(job.remaining for job in self.jobs.values()) / self.rate if self.rate else 0.0

    def check_open(self) -> None:
        """ApiError where nothing is taken now."""
        if self.draining:
            raise self._refused("draining", ApiError(503, "the server is ending", "draining", retry_after=30))
        if not self.is_ready:
            why = self.why if self.about is None else "the engine does not answer"
            raise self._refused("not_ready", ApiError(503, f"not ready: {why}", "not_ready", retry_after=5))

    def check_memory(self, request, opened) -> None:
        """ApiError 400 where the pictures take more memory than was free once the model was loaded."""
        about = self.about or {}
        if about.get("free") is None:
            return
        tokens, samples = samples_of(request, opened)
        said = PictureMemory(*about["memory"]).sentence(
            about["free"], request.size(opened), tokens * samples, request.steps_taken, "this server"
        )
        if said is not None:
            raise self._refused("memory", ApiError(400, said, "out_of_memory", "size"))

    def check_room(self, cost: float, size: int) -> None:
        """ApiError 429 where this much work would wait too long."""
        limits, waiting = self.settings.limits, [j for j in self.jobs.values() if j.status == QUEUED]
        if not self.jobs:
            return  # whatever it takes: nothing else is here
        wait = self.expected_wait() + (cost / self.rate if self.rate else 0.0)
        reason = None
        if len(waiting) >= limits.queued:
            reason = f"{len(waiting)} requests wait already"
        elif wait > limits.wait:
            reason = f"it would be done in about {wait:.0f} s, and {limits.wait:g} s is the limit"
        elif size + sum(job.input_bytes for job in waiting) > limits.queued_bytes:
            reason = "the pictures of waiting requests take too much memory"
        if reason is not None:
            later = max(wait - limits.wait, self.expected_wait() / (len(waiting) + 1), 1.0)
            raise self._refused("full", ApiError(
                429, f"the server is full: {reason}", "rate_limit_exceeded", retry_after=later
            ))  # fmt: skip

    def _refused(self, reason: str, error: ApiError) -> ApiError:
        self.metrics.rejected.labels(reason).inc()
        return error

    def submit(self, job: Job) -> None:
        self.check_open()
        self.check_room(job.cost, job.input_bytes)
        self.jobs[job.id] = job
        self.engine.submit(job.task)
        if (seconds := job.fields.timeout) is not None:
            asyncio.get_running_loop().call_later(seconds, self._late, job)
        self._count()

    def cancel(self, id: str, reason: str) -> bool:
        """False where it is over."""
        if id not in self.jobs:
            return False
        self.engine.cancel(id, reason)
        return True

    def _late(self, job: Job) -> None:
        """Its time is over: it is answered now, and leaves the engine after what the engine does at this moment."""
        if job.id in self.jobs and job.finished is None:
            self.engine.cancel(job.id, "deadline")
            self._on_job(job, Cancelled(job.id, "deadline"))

    def position(self, job: Job) -> int | None:
        """Waiting requests that came before; None where it does not wait."""
        if job.status != QUEUED:
            return None
        return sum(other.status == QUEUED and other.created < job.created for other in self.jobs.values())

    def find(self, id: str) -> Job:
        """ApiError 404 or 410 where there is none."""
        job = self.jobs.get(id) or self.store.get(id)
        if job is None:
            raise ApiError(404, f"there is no job {id[:100]}", "not_found")
        return job

    async def drain(self) -> None:
        """Take nothing more; wait for what is here, cancel what takes too long."""
        self.draining = True
        self.metrics.ready.set(0)
        until = time.monotonic() + self.settings.limits.drain
        while self.jobs and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for id in list(self.jobs):
            self.cancel(id, "drain")
        while self.jobs and time.monotonic() < until + 10:
            await asyncio.sleep(0.05)

    def abandon(self) -> None:
        """Wait for nothing more: the engine is ended as it is, which answers its requests as of a crash."""
        self.draining = True
        if self.engine is not None:
            self.engine.kill()

    # ---- what the engine says -----------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        self._spoke, metrics = time.monotonic(), self.metrics
        if isinstance(event, Ready):
            self.about, self._attempts = event.about, 0
            metrics.loras.set(len(self.loras))
            metrics.ready.set(0 if self.draining else 1)
            self.on_ready()
            said = {name: value for name, value in event.about.items() if name not in INTERNALS}
            logger.info("ready", extra={"fields": {"model": self.settings.model.name, **said}})
        elif isinstance(event, Alive):
            self.rate = event.rate or self.rate
            self.store.expire()
            for kind, size in event.memory.items():
                metrics.memory.labels(kind).set(size)
        elif isinstance(event, WaveRan):
            metrics.wave_seconds.observe(event.seconds)
            metrics.wave_tokens.observe(event.tokens)
            metrics.wave_requests.observe(event.requests)
            metrics.steps.inc(event.requests)
        elif (job := self.jobs.get(event.id)) is not None:
            self._on_job(job, event)

    def _on_job(self, job: Job, event: Event) -> None:
        if isinstance(event, Began):
            job.status, job.began = GENERATING, time.time()
            self.metrics.queue_seconds.observe(event.seconds)
        elif isinstance(event, Stepped):
            job.step, job.steps, job.left = event.step, event.steps, event.left
            if event.preview is not None and event.number is not None:
                if job.task.every_step:
                    job.previews.clear()  # the latest alone
                job.previews[event.number] = event.preview
                if job.first_preview is None:
                    job.first_preview = time.time() - job.created
                    self.metrics.first_partial.observe(job.first_preview)
        elif isinstance(event, Finished):
            job.finished, job.left = event, 0.0
            for stage, seconds in event.seconds.items():
                if stage in ("text", "encode", "denoise", "decode"):
                    self.metrics.stage_seconds.labels(stage).observe(seconds)
            task = asyncio.get_running_loop().create_task(self._complete(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(event, Failed):
            self.metrics.failed.labels(event.kind).inc()
            self._over(job, FAILED, of_failure(event.kind, event.sentence))
        elif isinstance(event, Cancelled):
            self.metrics.cancelled.labels(event.reason).inc()
            self._over(job, CANCELLED, of_cancelled(event.reason))
        job.change()
        self._count()

    async def _complete(self, job: Job) -> None:
        try:
            await self._finish(job)
            await asyncio.to_thread(self.store.write, job)
        except Exception as error:
            logger.exception("an answer could not be made", extra={"fields": {"id": job.id}})
            self._over(job, FAILED, ApiError(500, f"the picture could not be written: {error}", "encoding_failed"))
        else:
            assert job.finished is not None
            images = [image for layers in job.finished.images for image in layers]
            self.metrics.images.inc(len(images))
            self.metrics.pixels.inc(sum(image.width * image.height for image in images))
            self._over(job, COMPLETED, None)
        job.change()
        self._count()

    def _over(self, job: Job, status: str, error: ApiError | None) -> None:
        job.status, job.error, job.finished = status, error, None
        job.previews.clear()
        job.task.opened = {}
        self.jobs.pop(job.id, None)
        if job.kept:
            self.store.keep(job)

    def _on_end(self, number: int, code: int | None) -> None:
        """The engine's process has ended: its requests are answered, and it is started again."""
        if self.ended:
            return
        known = self.about is not None
        self.about, self.why = None, f"the engine ended with code {code} and is started again"
        self.metrics.ready.set(0)
        logger.error("the engine has ended", extra={"fields": {"code": code, "requests": len(self.jobs)}})
        for job in list(self.jobs.values()):
            if job.finished is None:
                self.metrics.failed.labels("crashed").inc()
                self._over(
                    job, FAILED, of_failure("crashed", f"the engine ended with code {code}; it is started again")
                )
                job.change()
        self.metrics.restarts.inc()
        pause = 0.0 if known else PAUSES[min(number, len(PAUSES) - 1)]
        asyncio.get_running_loop().call_later(pause, self._again)

    def _again(self) -> None:
        if not (self.ended or self.draining):
            self.begin()

    def _count(self) -> None:
        waiting = [job for job in self.jobs.values() if job.status == QUEUED]
        self.metrics.queued.set(len(waiting))
        self.metrics.queued_tokens.set(sum(j.task.request.tokens(j.task.opened) for j in waiting))
        self.metrics.running.set(len(self.jobs) - len(waiting))
        self.metrics.store_bytes.set(self.store.bytes)
