"""The noise levels of a request before anything is computed, and whether a transformer without modulation weights has
their vectors: known from the header of its file, before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from qwen_image_fast.model_defaults import Generation
from qwen_image_fast.models.modulation import model_timesteps
from qwen_image_fast.models.stored_modulation import (
    DTYPE,
    SCHEDULES,
    StoredSchedule,
    is_stored,
    named,
    schedules_in,
    schedules_of_file,
)
from qwen_image_fast.pipelines.conditions import VAE_AREA
from qwen_image_fast.pipelines.images import area_size
from qwen_image_fast.request import Request
from qwen_image_fast.request_fields import tokens_of
from qwen_image_fast.sampling import noise_levels, schedule_shift
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler, named_schedule
from qwen_image_fast.weights.formats import Opened


class StoredLevels(NamedTuple):
    """What a transformer without modulation weights has: its schedules; at_zero: references are at noise level 0."""

    schedules: Sequence[StoredSchedule]
    at_zero: bool

    @classmethod
    def of_model(cls, transformer: Any) -> StoredLevels | None:
        """None: it has the weights."""
        if not is_stored(transformer):
            return None
        return cls(schedules_in(getattr(transformer, SCHEDULES)), bool(transformer.config.zero_cond_t))

    @classmethod
    def of_file(cls, opened: Opened, config: Mapping[str, Any]) -> StoredLevels | None:
        """Of an opened file, and the transformer's configuration. None: it has the weights."""
        schedules = schedules_of_file(opened.weights)
        return cls(schedules, opened.zero_cond_t or bool(config.get("zero_cond_t"))) if schedules else None

    def check(self, request: Request, opened: Mapping[str, Any], scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        """ValueError, which names what there is, where a noise level of the request is not stored.

        Args:
            opened: the request's pictures. scheduler: the model's own; it is not changed.
        """
        if request.kind == "layers":  # whose schedule depends on its picture; no file is made for it
            return
        stored = {t for schedule in self.schedules for t in schedule.timesteps}
        if stored.issuperset(timesteps_of(request, opened, scheduler, self.at_zero)):
            return
        (width, height), steps = drawn_size(request, opened), request.steps
        fast = getattr(request, "lightning", None) is not None
        asked = f"{steps} steps of {width}x{height}{' with Lightning' if fast else ''}"
        again = f"--lightning {steps}" if fast else f"--steps {steps} --size {width}x{height}"
        raise ValueError(
            "the modulation weights were left out of this transformer, and its vectors are for "
            f"{named(self.schedules)}, not for {asked}: take such a schedule, or make a file for this one, by "
            f"`qwen-image-fast quantize MODEL --out FOLDER --drop-modulation {again}`"
        )

    def offered(self) -> list[dict[str, int]]:
        """What a server offers: {"steps", "width", "height"} of each schedule at each of its sizes; where there are
        none but Lightning's, which have any size, {"steps", "lightning"}."""
        sized, fast = [], []
        for schedule in self.schedules:
            if found := re.fullmatch(r"(\d+) steps of (.+)", schedule.what):
                steps = int(found[1])
                sizes = re.findall(r"(\d+)x(\d+)", found[2])
                sized += [{"steps": steps, "width": int(w), "height": int(h)} for w, h in sizes]
                fast += [{"steps": steps, "lightning": steps}] if "any size with Lightning" in found[2] else []
        return sized or fast

    def usual(self, generation: Generation) -> Generation:
        """The model's defaults with the nearest schedule there is: of its size if possible, then of its steps."""
        own = {"width": generation.width or 1328, "height": generation.height or 1328, "steps": generation.steps or 50}

        def distance(found: dict[str, int]) -> tuple[int, int]:
            size = sum(abs(found.get(side, own[side]) - own[side]) for side in ("width", "height"))
            return size, abs(found["steps"] - own["steps"])

        nearest = min(self.offered(), key=distance, default={})
        return generation.model_copy(update={name: value for name, value in nearest.items() if name != "lightning"})


def drawn_size(request: Request, opened: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of what is denoised, which a schedule depends on."""
    given = getattr(request, "width", None) is not None or getattr(request, "height", None) is not None
    if getattr(request, "megapixel", False) and not given:
        return area_size(VAE_AREA, *opened["image"][-1].size)
    return request.size(opened)


def timesteps_of(
    request: Request, opened: Mapping[str, Any], scheduler: FlowMatchEulerDiscreteScheduler, at_zero: bool
) -> tuple[float, ...]:
    """Those of all steps, as the transformer in bfloat16 is given them."""
    lightning = getattr(request, "lightning", None)
    config = {} if lightning is None else named_schedule(f"lightning-{lightning}")[0]
    own = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **config)
    levels = noise_levels(own, schedule_shift(own, tokens_of(*drawn_size(request, opened))), request.steps)
    noise = [*levels[:-1].tolist(), *([0.0] if at_zero else [])]
    return tuple(model_timesteps(noise, DTYPE, torch.device("cpu")).tolist())
