"""Modulation vectors of a diffusers pipeline: computed once per time step, without reading device values in the loop.

A modulation vector depends on the time step and the modulation weights only. The pipelines' loops hold the time step as
an element of the scheduler's `timesteps`; which element, its place in memory tells. The schedule itself, and a checksum
of the weights, are read from the device once per call of the pipeline, before its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qwen_image_fast.models.hooks import is_bare, own_forward
from qwen_image_fast.models.modulation import Modulation, checksum


class Loop:
    """One call of a pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.checksum: tuple[int, ...] | None = None
        self._timesteps: tuple[Tensor, int] | None = None
        self.schedule: tuple[float, ...] = ()
        # By several processes (branches.py): whether all were asked for the same, whether steps have two branches, and
        # the first one of a step, which is computed with the second.
        self.checked = self.guided = False
        self.waiting: Any = None
        # With CUDA graphs (graphs.py): the time step and the transformer last looked at, and what was in their way.
        self.graphs: tuple[float, int] | None = None
        self.no_graphs: str | None = None

    def step(self, transformer: nn.Module, branch: str = "") -> Step | None:
        """Where the pipeline is now; None where it does not go through its scheduler's time steps one by one."""
        now = getattr(self.pipe, "_current_timestep", None)
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        if not isinstance(now, Tensor) or not isinstance(timesteps, Tensor) or now.dtype != timesteps.dtype:
            return None
        if now.dim() != 0 or timesteps.dim() != 1 or not timesteps.is_contiguous():
            return None
        index = now.storage_offset() - timesteps.storage_offset()
        same_memory = now.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        if not same_memory or not 0 <= index < len(timesteps):
            return None
        version = 0 if timesteps.is_inference() else timesteps._version
        if self._timesteps is None or self._timesteps[0] is not timesteps or self._timesteps[1] != version:
            self._timesteps, self.schedule = (timesteps, version), tuple(timesteps.tolist())
        return Step(self, transformer, self.schedule[index], branch)


@dataclass
class Step:
    """One time step of a loop: the `transformer` called, the element of `loop.schedule`, the branch of guidance."""

    loop: Loop
    transformer: nn.Module
    t: float
    branch: str = ""


# Set while a pipeline runs, and while it calls its transformer; every thread has its own.
current_loop: ContextVar[Loop | None] = ContextVar("qwen_image_fast_loop", default=None)
current_step: ContextVar[Step | None] = ContextVar("qwen_image_fast_step", default=None)


@dataclass
class ModulationTable:
    """The vectors of the time steps of one schedule, for one state of the weights."""

    key: tuple = ()
    additional_t_cond: Tensor | None = None
    rows: dict[float, tuple[tuple, Modulation]] = field(default_factory=dict)

    def get(
        self,
        step: Step,
        weights: list[Tensor],
        timestep: Tensor,
        additional_t_cond: Tensor | None,
        compute: Callable[[], Modulation],
    ) -> Modulation:
        """The vectors of `step`, from the table if they are there; `weights`: what they depend on."""
        # Within a call a weight that is written to has another version. From one call to the next also the values are
        # compared: merging an adapter, or an average of weights, writes through `.data`, which leaves no trace.
        versions = tuple((id(w), 0 if w.is_inference() else w._version) for w in weights)
        if step.loop.checksum is None:
            step.loop.checksum = checksum(weights)
        condition = None
        if additional_t_cond is not None:
            version = 0 if additional_t_cond.is_inference() else additional_t_cond._version
            condition = (id(additional_t_cond), version, len(timestep))
        key = (step.loop.schedule, step.loop.checksum, timestep.dtype, timestep.device, condition)
        if key != self.key:
            self.key, self.rows, self.additional_t_cond = key, {}, additional_t_cond
        if step.t not in self.rows or self.rows[step.t][0] != versions:
            self.rows[step.t] = (versions, compute())
        return self.rows[step.t][1]


def modulation_weights(transformer: Any) -> list[Tensor] | None:
    """The parameters that modulation vectors depend on; None if a layer is not a plain one, or has a hook.

    Or if a hook on the whole model may have changed the time step; those of offloading do not.
    """
    if transformer._forward_pre_hooks or (own_forward(transformer) and not _offloaded(transformer)):
        return None
    linears = [
        block._modules[mod]._modules["1"] for block in transformer.transformer_blocks for mod in ("img_mod", "txt_mod")
    ]
    linears += [transformer.norm_out.linear]
    time = list(transformer.time_text_embed.modules())
    linears += [m for m in time if next(m.parameters(recurse=False), None) is not None]
    if any(type(linear) not in (nn.Linear, nn.Embedding) for linear in linears) or not is_bare(*linears, *time):
        return None
    if any(type(m).__module__.split(".")[0] not in ("torch", "diffusers") for m in time):
        return None
    weights = [w for linear in linears for w in linear._parameters.values() if w is not None]
    if transformer.streamed is not None:  # those that are streamed cannot be written to
        weights = [w for w in weights if not w.is_meta]
    if any(type(w) is not nn.Parameter or w.is_meta or w.device != weights[0].device for w in weights):
        return None
    return weights


def _offloaded(model: nn.Module) -> bool:
    """Whether its forward was replaced by hooks of accelerate and diffusers alone."""
    hook = model.__dict__.get("_hf_hook")
    registry = model.__dict__.get("_diffusers_hook")
    hooks = [*getattr(hook, "hooks", [hook] if hook is not None else [])]
    hooks += [] if registry is None else registry.hooks.values()
    return bool(hooks) and all(type(h).__module__.split(".")[0] in ("accelerate", "diffusers") for h in hooks)
