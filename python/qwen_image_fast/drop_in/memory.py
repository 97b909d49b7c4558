"""A diffusers pipeline on a GPU that it does not fit on: its blocks are streamed from pinned memory of the host.

In place of accelerate's and diffusers' offloading hooks: the fast forward goes on running, the modulation vectors stay
tables, and what fits stays on the GPU. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_image_fast.drop_in.obstacle import obstacle
from qwen_image_fast.drop_in.swapped import Swapped
from qwen_image_fast.models.streamed_parts import is_streamed, plan_of, stream_parts
from qwen_image_fast.sizes import gb
from qwen_image_fast.weights.memory import CONTEXT
from qwen_image_fast.weights.plan import Plan


def streaming_device() -> torch.device:
    """The GPU that a pipeline is put on.

    Raises:
        ValueError: there is none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "accelerate: memory_limit must go with a GPU, and torch sees none here; on a CPU diffusers maps its files, "
            "and qwen_image_fast.QwenImagePipeline.from_pretrained(memory_limit=) streams them"
        )
    return torch.device("cuda", torch.cuda.current_device())


def stream_accelerated(parts: dict[str, nn.Module], limit: int, device: torch.device, base: int = CONTEXT) -> Plan:
    """Put the models of a pipeline on `device`, or as much of them as `limit` bytes hold.

    Args:
        parts: "transformer", accelerated; others as they are, of which "text_encoder" is streamed too.

    Raises:
        ValueError: the limit is too small, the fast forward may not run, or the parts are streamed already.
    """
    transformer: Any = parts["transformer"]
    why = obstacle(transformer) if isinstance(transformer, Swapped) else "it could not be accelerated"
    if why:
        raise ValueError(f"accelerate: memory_limit needs the fast forward of the transformer: {why}")
    if any(map(is_streamed, parts.values())):
        raise ValueError("accelerate: memory_limit is in force already; restore(pipe) first")
    plan = plan_of(parts, limit, base)
    stream_parts(parts, plan, device)
    return plan


def said(plan: Plan) -> list[str]:
    """For the report."""
    found = [f"memory: {gb(plan.peak)} of {gb(plan.limit)} by the plan"]
    for track, often in (("blocks", "step"), ("layers", "prompt"), ("modulation", "schedule")):
        if size := plan.streamed(track):
            found.append(f"memory: {gb(size)} of {track} are streamed for every {often}")
    return found
