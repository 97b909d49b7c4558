"""An engine: requests of any size join and leave at every step of one packed forward. It knows no HTTP.

One thread takes the steps, in waves; another encodes and decodes beside it (side.py). A wave is one step of some of the
running requests: the one that had least of the machine so far, and all that fit beside it. Whatever joins and leaves,
on the CPU every picture has the bits of the one made alone by the pipeline (alike.py says how).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.pipelines.base import Pipeline
from qwen_image_fast.request import Request
from qwen_image_fast.request_schedule import StoredLevels
from qwen_image_fast.sampling import Wave, start
from qwen_image_fast.serving import alike
from qwen_image_fast.serving.adapters import Composition, Registered
from qwen_image_fast.serving.cost import StepCost
from qwen_image_fast.serving.fair_queue import FairQueue, weight
from qwen_image_fast.serving.messages import (
    Began,
    Cancelled,
    Event,
    Failed,
    Finished,
    Stepped,
    Task,
    WaveRan,
)
from qwen_image_fast.serving.previews import Previews
from qwen_image_fast.serving.side import Side
from qwen_image_fast.serving.work import Work

AHEAD = 4  # requests that are encoded before there is room for them
KEPT_WAVES = 8  # layouts of groups that may run again
KEPT_TABLES = 16  # schedules whose modulation vectors are kept beside those in use


@dataclass(frozen=True)
class Limits:
    """wave_tokens: of one wave, of all branches; a request that has more runs in waves of its own."""

    wave_tokens: int = 2048


class Engine:
    """`submit` and `cancel` from any thread; `on_event` is called from the engine's own, and must return soon."""

    def __init__(
        self,
        pipe: Pipeline,
        on_event: Callable[[Event], None],
        *,
        pipelines: Callable[[Request], Any] | None = None,
        loras: Registered | None = None,
        limits: Limits | None = None,
    ):
        """`pipelines`: the one that makes a request, around the models of `pipe`; default: `pipe` itself."""
        self.pipe, self.on_event, self.limits = pipe, on_event, limits or Limits()
        self.pipelines = pipelines or (lambda request: pipe)
        self.loras = loras
        self.stored = StoredLevels.of_model(pipe.transformer)
        self.cost = StepCost.of(pipe.transformer.config)
        self._small = self.cost.step(self.limits.wave_tokens // 8)
        with torch.inference_mode():
            self.previews = Previews(pipe.vae)
            self.enough_rows = self._enough_rows()
        self.amx = alike.uses_amx(pipe.transformer, pipe.device, pipe.dtype)
        self.rate = 0.0
        self._changed = threading.Condition()
        self._queue: FairQueue[Work] = FairQueue()
        self._works: dict[str, Work] = {}
        self._encoding: list[Work] = []
        self._encoded: list[Work] = []
        self._running: list[Work] = []
        self._ended = False
        self._clock = 0.0
        self._waves: OrderedDict[tuple[int, ...], Wave] = OrderedDict()
        self._tables: OrderedDict[Any, Modulation] = OrderedDict()
        self._side = Side()
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    # ---- from any thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        self._side.start()
        self._thread.start()

    def submit(self, task: Task) -> None:
        """A schedule that the transformer has no modulation vectors for has failed at once, before it waits."""
        if self.stored is not None:
            try:
                self.stored.check(task.request, task.opened, self.pipe.scheduler)
            except ValueError as error:
                self.on_event(Failed(task.id, str(error), "invalid"))
                return
        work = Work(task, self.cost.request(task.request, task.opened))
        with self._changed:
            if self._ended:
                raise RuntimeError("the engine has ended")
            self._works[task.id] = work
            seconds = work.cost / self.rate if self.rate else 0.0
            self._queue.push(
                work, now=work.came, seconds=seconds, cost=work.cost, priority=task.priority, tenant=task.tenant
            )
            self._changed.notify()

    def cancel(self, id: str, reason: str = "asked") -> bool:
        """It leaves before the next step; False where it is not there (any more)."""
        with self._changed:
            work = self._works.get(id)
            if work is not None and work.cancelled is None:
                work.cancelled = reason
                self._changed.notify()
            return work is not None

    @property
    def is_alive(self) -> bool:
        """Whether both threads run; where one has failed, nothing more becomes of any request."""
        return self._thread.is_alive() and self._side.is_alive

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait, and all others."""
        with self._changed:
            return len(self._queue), len(self._works) - len(self._queue)

    def end(self) -> None:
        """After the step that runs now; what is not done is cancelled."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        self._side.end()
        for work in list(self._works.values()):
            self._leave(work, Cancelled(work.id, work.cancelled or "the engine has ended"))

    # ---- the thread of the steps --------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._ended or self._has_work())
                    if self._ended:
                        return
                self._drop_cancelled()
                self._let_in()
                if self._running:
                    self._take_steps()

    def _has_work(self) -> bool:
        if self._running or self._encoded or any(w.cancelled is not None for w in self._queue):
            return True
        return len(self._encoding) < AHEAD and any(map(self._may_begin, self._queue))

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = self._queue.remove(lambda w: w.cancelled is not None)
            dropped += [w for w in self._encoded if w.cancelled is not None]
            self._encoded = [w for w in self._encoded if w.cancelled is None]
        for work in [w for w in self._running if w.cancelled is not None]:
            self._stop(work)
            dropped.append(work)
        for work in dropped:
            self._leave(work, Cancelled(work.id, work.cancelled or ""))

    def _let_in(self) -> None:
        """From the queue to the other thread, and from there among the running."""
        with self._changed:
            while len(self._encoding) + len(self._encoded) < AHEAD:
                work = self._queue.pop(self._may_begin)
                if work is None:
                    break
                self._encoding.append(work)
                self._side.put(lambda work=work: self._encode(work), finishes=False)  # type: ignore[misc]
            waiting, self._encoded = self._encoded, []
        blocked = False
        for work in waiting:
            try:
                if not work.tracks:
                    self._start(work)
                large = work.tokens > self.limits.wave_tokens
                room = self.limits.wave_tokens - sum(w.tokens for w in self._running if not self._is_large(w))
                if large or (work.tokens <= room and not blocked):
                    work.clock = self._clock
                    self._running.append(work)
                    continue
                blocked = True
                with self._changed:
                    self._encoded.append(work)
            except Exception as error:
                self._fail(work, error)

    def _is_large(self, work: Work) -> bool:
        return work.tokens > self.limits.wave_tokens

    def _may_begin(self, work: Work) -> bool:
        """Of requests larger than a wave one at a time: others would only make all of them late."""

        def large(other: Work) -> bool:
            request = other.task.request
            branches = (2 if request.cfg > 1 else 1) * request.each
            return branches * request.tokens(other.task.opened) > self.limits.wave_tokens

        return not large(work) or not any(map(large, [*self._encoding, *self._encoded, *self._running]))

    def _start(self, work: Work) -> None:
        """Its samples, with the modulation vectors of all its steps."""
        assert work.denoising is not None
        call, samples, options = work.denoising
        control = options.pop("control", None)
        if unknown := options.keys() - {"begin", "rescale"}:
            raise ValueError(f"an engine must not be given {', '.join(sorted(unknown))}")
        self._activate(work.loras)
        work.tracks = start(
            self.pipe.transformer, work.pipe.scheduler, samples, steps=call.num_inference_steps, sigmas=call.sigmas,
            guidance=call.true_cfg_scale, tables=lambda noise, flag: self._table(work.loras, noise, flag), **options,
        )  # fmt: skip
        if control is not None:
            work.residuals = control(torch.stack([t.levels for t in work.tracks], 1)[:-1])

    def _table(self, loras: Composition, noise, flag) -> Modulation:
        key = (loras, tuple(noise), flag)
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = self.pipe.transformer.modulation_tables.get(self.pipe.transformer, noise, flag)
        self._tables[key] = table
        while len(self._tables) > KEPT_TABLES:
            self._tables.popitem(last=False)
        return table

    def _activate(self, loras: Composition) -> None:
        if self.loras is not None:
            self.loras.activate(loras, "transformer")

    def _take_steps(self) -> None:
        """One wave, and what follows from it."""
        began, chosen = time.perf_counter(), self._choose()
        self._activate(chosen[0].loras)
        shown = {work.id: work.shows() for work in chosen}
        before = {id(t): t.latents for work in chosen if shown[work.id] is not None for t in work.tracks}
        groups = alike.groups([w for w in chosen if w.residuals is None], self.enough_rows, self.amx)
        groups += [[w] for w in chosen if w.residuals is not None]  # what a ControlNet adds is of one request's rows
        failed = [w for group in groups for w in self._step(group)]
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize(self.pipe.device)
        seconds = time.perf_counter() - began
        stepped = [w for w in chosen if w not in failed]
        cost = sum(w.step_cost(self.cost) for w in stepped)
        tokens, requests = sum(w.tokens for w in stepped), len(stepped)
        if stepped:
            self.rate = cost / seconds if not self.rate else 0.9 * self.rate + 0.1 * cost / seconds
        for work in stepped:
            work.seconds["denoise"] = work.seconds.get("denoise", 0.0) + seconds
            self._say_step(work, shown[work.id], before)
            if work.done:
                self._stop(work)
                self._side.put(lambda work=work: self._decode(work), finishes=True)  # type: ignore[misc]
        waiting, running = self.load
        self.on_event(WaveRan(seconds, tokens, requests, cost, waiting, running))

    def _choose(self) -> list[Work]:
        """The running request with the least of the machine so far, and what fits beside it with the same LoRAs.

        One that had more only where it does not make the wave twice as long, or where all are small: else every step of
        a small request would take the time of its largest neighbour's.
        """
        order = sorted(self._running, key=lambda w: w.clock)
        chosen, tokens, cost = [order[0]], order[0].tokens, order[0].step_cost(self.cost)
        self._clock = order[0].clock
        for work in order[1:]:
            own = work.step_cost(self.cost)
            if work.loras != chosen[0].loras or tokens + work.tokens > self.limits.wave_tokens:
                continue
            if work.clock <= self._clock or own <= max(cost, self._small):
                chosen.append(work)
                tokens, cost = tokens + work.tokens, cost + own
        for work in chosen:
            work.clock += work.step_cost(self.cost) / weight(work.task.priority)
        return chosen

    def _step(self, group: list[Work]) -> list[Work]:
        """One forward; where it fails, each alone, so that only the one that cannot is lost. Returns those."""
        try:
            key = tuple(work.number for work in group)
            wave = self._waves.pop(key, None)
            if wave is None:
                wave = Wave(self.pipe.transformer, [t for work in group for t in work.tracks])
            wave.step(residuals=group[0].next_residuals())
            self._waves[key] = wave
            while len(self._waves) > KEPT_WAVES:
                self._waves.popitem(last=False)
            return []
        except Exception as error:
            if len(group) > 1:
                return [lost for work in group for lost in self._step([work])]
            self._stop(group[0])
            self._fail(group[0], error)
            return group

    def _stop(self, work: Work) -> None:
        """It takes no further step."""
        self._running.remove(work)
        self._waves = OrderedDict((key, wave) for key, wave in self._waves.items() if work.number not in key)

    def _say_step(self, work: Work, index: int | None, before: Mapping[int, torch.Tensor]) -> None:
        taken, steps = work.steps
        costs = [w.step_cost(self.cost) for w in self._running]
        # Between two of its steps the others take theirs, as far as they have had no more of the machine.
        left = (steps - taken) * min(sum(costs), len(costs) * work.step_cost(self.cost)) / self.rate
        preview = None
        if index is not None:
            preview = [self.previews.of(t, before[id(t)]) for t in work.tracks]
        self.on_event(Stepped(work.id, taken, steps, left, preview, index))

    # ---- the other thread ---------------------------------------------------------------------------------------

    def _encode(self, work: Work) -> None:
        work.seconds["queue"] = time.perf_counter() - work.came
        self.on_event(Began(work.id, work.seconds["queue"]))
        try:
            if work.cancelled is None:
                if self.loras is not None:
                    self.loras.activate(work.loras, "text_encoder")
                work.begin(self.pipelines(work.task.request))
        except Exception as error:
            with self._changed:
                self._encoding.remove(work)
                self._changed.notify()
            self._fail(work, error)
            return
        with self._changed:
            self._encoding.remove(work)
            self._encoded.append(work)
            self._changed.notify()

    def _decode(self, work: Work) -> None:
        try:
            if work.cancelled is not None:
                self._leave(work, Cancelled(work.id, work.cancelled))
                return
            tokens = [t.latents for t in work.tracks]
            work.pipe.check_result(tokens)
            usage, output = work.usage(), work.finish(tokens)
        except Exception as error:
            self._fail(work, error)
            return
        stages = {"text encoder": "text", "vision": "text", "encode": "encode", "decode": "decode"}
        for name, spent in work.pipe.times.items():
            stage = stages.get(name, name)
            work.seconds[stage] = work.seconds.get(stage, 0.0) + spent
        work.seconds["total"] = time.perf_counter() - work.came
        images = [image if isinstance(image, list) else [image] for image in output.images]
        prompts = output.prompts or [work.task.request.prompt]
        self._leave(work, Finished(work.id, images, output.seeds, prompts, work.seconds, usage))

    # ---- both ---------------------------------------------------------------------------------------------------

    def _fail(self, work: Work, error: Exception) -> None:
        kind = "error"
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            kind = "memory"
        elif isinstance(error, (ValueError, TypeError)):
            kind = "invalid"
        self._leave(work, Failed(work.id, str(error) or type(error).__name__, kind))

    def _leave(self, work: Work, event: Event) -> None:
        with self._changed:
            if self._works.pop(work.id, None) is None:
                return
            self._changed.notify()
        work.close()
        self.on_event(event)

    def _enough_rows(self) -> int | None:
        """Of the model with any of its LoRAs."""
        model, found = self.pipe.transformer, []
        for loras in [(), *(((name, 1.0),) for name in (self.loras.names if self.loras else ()))]:
            self._activate(loras)
            found.append(alike.enough_rows(model, self.pipe.device, self.pipe.dtype))
        self._activate(())
        return None if None in found else max(n for n in found if n is not None)
