"""The modulation vectors of given schedules, made one weight at a time: what a file has that leaves the weights out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.models.modulation import model_timesteps
from qwen_image_fast.models.stored_modulation import DTYPE, VECTORS, StoredSchedule
from qwen_image_fast.models.transformer_modules import QwenTimestepProjEmbeddings
from qwen_image_fast.quantize_report import SIGMAS
from qwen_image_fast.request_fields import tokens_of
from qwen_image_fast.sampling import noise_levels, schedule_shift
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler, named_schedule
from qwen_image_fast.weights.stored import Weight

Read = Callable[[str], Tensor]


def schedules_for(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: Sequence[int], sizes: Sequence[tuple[int, int]],
    lightning: Sequence[int] = (), at_zero: bool = False,
) -> list[StoredSchedule]:  # fmt: skip
    """Those of all numbers of steps at all sizes, of Lightning's numbers at any size, and of what `quantize` compares.

    Args:
        sizes: width and height in pixels. at_zero: references are at noise level 0 (`zero_cond_t`).
    """
    found: dict[tuple[float, ...], tuple[int, list[str]]] = {}
    for count in steps:
        for width, height in sizes:
            levels = noise_levels(scheduler, schedule_shift(scheduler, tokens_of(width, height)), count)
            found.setdefault(_timesteps(levels, at_zero), (count, []))[1].append(f"{width}x{height}")
    for count in lightning:
        config, _ = named_schedule(f"lightning-{count}")
        fast = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **config)
        levels = noise_levels(fast, schedule_shift(fast, 1), count)
        found.setdefault(_timesteps(levels, at_zero), (count, []))[1].append("any size with Lightning")
    compared = [StoredSchedule("", (torch.tensor(sigma, dtype=DTYPE).item(),) + (0.0,) * at_zero) for sigma in SIGMAS]
    return [StoredSchedule(f"{n} steps of {', '.join(names)}", own) for own, (n, names) in found.items()] + compared


def _timesteps(levels: Tensor, at_zero: bool) -> tuple[float, ...]:
    own = [*levels[:-1].tolist(), *([0.0] if at_zero else [])]
    return tuple(model_timesteps(own, DTYPE, torch.device("cpu")).tolist())


class Vectors:
    """What takes the place of the modulation weights in `weights`, by its name in the file.

    Args:
        read: reads a weight, with LoRAs merged.
    """

    def __init__(self, weights: Mapping[str, Weight], schedules: Sequence[StoredSchedule], read: Read) -> None:
        self.weights, self.schedules, self.read = weights, schedules, read
        self._conditions: list[Tensor] = []

    def left_out(self) -> set[str]:
        """The names of the weights."""
        return {name for layer in self._layers() for name in (f"{layer}.weight", f"{layer}.bias")}

    def like(self) -> Iterable[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """Type and shape of every tensor but `modulation_schedules`."""
        rows = sum(len(s.timesteps) for s in self.schedules)
        for layer in self._layers():
            yield _place(layer), (DTYPE, (rows, self.weights[f"{layer}.weight"].shape[0]))

    def make(self, name: str) -> Tensor:
        """The vectors of this name, each schedule's by itself, as a model in bfloat16 computes them for it."""
        layer = next(layer for layer in self._layers() if _place(layer) == name)
        weight, bias = (self.read(f"{layer}.{kind}").to(DTYPE) for kind in ("weight", "bias"))
        with torch.no_grad():
            return torch.cat([F.linear(temb, weight, bias) for temb in self.conditions()])

    def conditions(self) -> list[Tensor]:
        """silu(temb) of each schedule, [timesteps, width]."""
        if not self._conditions:
            part = "time_text_embed."
            own = {n.removeprefix(part): self.read(n).to(DTYPE) for n in self.weights if n.startswith(part)}
            with torch.device("meta"):
                embed: Any = QwenTimestepProjEmbeddings(len(own["timestep_embedder.linear_2.bias"]))
            embed.load_state_dict(own, assign=True)
            with torch.no_grad():
                for schedule in self.schedules:
                    timestep = torch.tensor(schedule.timesteps, dtype=DTYPE)
                    self._conditions.append(F.silu(embed(timestep, timestep.new_empty(0))))
        return self._conditions

    def _layers(self) -> list[str]:
        ends = (".img_mod.1.weight", ".txt_mod.1.weight", "norm_out.linear.weight")
        return [name.removesuffix(".weight") for name in self.weights if name.endswith(ends)]


def _place(layer: str) -> str:
    return f"{layer.rpartition('.')[0]}.{VECTORS}"
