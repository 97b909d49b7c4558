"""A request while an engine works on it."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.pipelines.in_parts import Denoising, Parts
from qwen_image_fast.sampling import Residuals, Track
from qwen_image_fast.serving.adapters import Composition, composition
from qwen_image_fast.serving.cost import StepCost
from qwen_image_fast.serving.messages import Task, Usage
from qwen_image_fast.serving.previews import preview_steps


@dataclass(eq=False)
class Work:
    """cost: of all its steps, about. clock: the cost of its steps so far, over its weight, on the engine's clock."""

    task: Task
    cost: float
    came: float = field(default_factory=time.perf_counter)
    number: int = field(default_factory=itertools.count().__next__)
    cancelled: str | None = None
    pipe: Any = None
    parts: Parts | None = None
    denoising: Denoising | None = None
    tracks: list[Track] = field(default_factory=list)
    residuals: Residuals | None = None
    clock: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.task.id

    @property
    def loras(self) -> Composition:
        return composition(self.task.loras)

    def begin(self, pipe: Any) -> None:
        """The first part of the pipeline's call: checks, texts, what goes in as pictures."""
        request = self.task.request
        self.pipe = copy.copy(pipe)  # what a call keeps on its pipeline is its own
        self.pipe.on_stage = None
        arguments = request.call(self.task.opened)
        if lightning := getattr(request, "lightning", None):
            self.pipe.use_schedule(f"lightning-{lightning}")
        call: Any = type(pipe).__call__
        self.parts = call.parts(self.pipe, **arguments, progress=False)
        self.denoising = next(self.parts)

    def finish(self, tokens: list[Tensor]) -> Any:
        """The second part: pictures of latents; what the call returns."""
        assert self.parts is not None
        try:
            self.parts.send(tokens)
        except StopIteration as end:
            return end.value
        raise RuntimeError(f"{type(self.pipe).__name__} must denoise once in a call")

    def close(self) -> None:
        """End the call where it stands, and let go of its tensors."""
        if self.parts is not None:
            self.parts.close()
        self.parts = self.denoising = self.pipe = self.residuals = None
        self.tracks = []

    # ---- its part in a forward ----------------------------------------------------------------------------------

    @property
    def image_rows(self) -> int:
        return sum(t.branches * sum(f * h * w for f, h, w in t.sample.shapes) for t in self.tracks)

    @property
    def text_rows(self) -> int:
        return sum(len(t.cond) + (0 if t.uncond is None else len(t.uncond)) for t in self.tracks)

    @property
    def tokens(self) -> int:
        return self.image_rows + self.text_rows

    def step_cost(self, model: StepCost) -> float:
        total = 0.0
        for t in self.tracks:
            images = sum(f * h * w for f, h, w in t.sample.shapes)
            texts = [len(t.cond), *([] if t.uncond is None else [len(t.uncond)])]
            total += sum(model.step(images + n) for n in texts)
        return total

    def next_residuals(self) -> Sequence[Tensor] | None:
        """Of ControlNets, for the next step."""
        if self.residuals is None:
            return None
        return self.residuals(self.tracks[0].step, torch.cat([t.latents for t in self.tracks]))

    @property
    def done(self) -> bool:
        return bool(self.tracks) and self.tracks[0].done

    @property
    def begin_step(self) -> int:
        assert self.denoising is not None
        return int(self.denoising.options.get("begin", 0))

    @property
    def steps(self) -> tuple[int, int]:
        """Taken, and to take."""
        track = self.tracks[0]
        return track.step - self.begin_step, len(track.dt) - self.begin_step

    def shows(self) -> int | None:
        """The number of the preview that the next step ends with."""
        taken, steps = self.steps
        if self.task.every_step:
            return taken if taken + 1 < steps else None
        wanted = preview_steps(steps, self.task.previews)
        return wanted.index(taken + 1) if taken + 1 in wanted else None

    def usage(self) -> Usage:
        def tokens(shapes: Sequence[tuple[int, int, int]]) -> int:
            return sum(f * h * w for f, h, w in shapes)

        first = self.tracks[0]
        output = sum(t.sample.layers * tokens([t.sample.shape]) for t in self.tracks)
        return Usage(len(first.cond), tokens(first.sample.reference_shapes), output)
