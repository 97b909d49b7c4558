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
from qwen_image_fast.models.streaming import refuse_moves, stream_layers, stream_tensors, units_of
from qwen_image_fast.models.vae_conv import packed_bytes_of
from qwen_image_fast.sizes import gb
from qwen_image_fast.weights.cuda_lane import CudaLane, CudaStreams
from qwen_image_fast.weights.memory import CONTEXT
from qwen_image_fast.weights.plan import PartSize, Plan, make_plan, working_bytes
from qwen_image_fast.weights.ring import Ring

CPU = torch.device("cpu")


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


def stream_parts(parts: dict[str, nn.Module], limit: int, device: torch.device, base: int = CONTEXT) -> Plan:
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
    if any(part.__dict__.get("streamed") is not None for part in parts.values()):
        raise ValueError("accelerate: memory_limit is in force already; restore(pipe) first")
    sizes = [part_size(name, part) for name, part in parts.items()]
    weight = transformer.img_in.weight
    working = working_bytes(len(weight), len(transformer.transformer_blocks), weight.element_size())
    plan = make_plan(sizes, limit, base, working)
    if not plan.streams:
        for part in parts.values():
            part.to(device)
        return plan
    ring = Ring(plan.buffer, plan.buffers, CudaLane(CudaStreams(device)) if device.type == "cuda" else None)
    for name, part in parts.items():
        stays = {track: units for (own, track), units in plan.stays.items() if own == name}
        streamed = stream_tensors(part, ring, stays if units(name, part) else {}, device)
        if streamed.unit_of:
            part.__dict__["streamed"] = streamed
            refuse_moves(part)
        if name == "text_encoder":
            stream_layers(streamed, text_layers(part))
    return plan


def restore_parts(parts: dict[str, nn.Module]) -> bool:
    """All weights in memory of the host again; False if none is streamed."""
    found = False
    for part in parts.values():
        streamed = part.__dict__.pop("streamed", None)
        if streamed is not None:
            streamed.end()
            del part.__dict__["_apply"]
            part.to(CPU)
            found = True
    return found


def part_size(name: str, part: nn.Module) -> PartSize:
    tensors = dict(part.named_parameters())
    found = {track: [sum(tensors[n].nbytes for n in own) for own in us] for track, us in units(name, part).items()}
    streamed = sum(map(sum, found.values()))
    kept = sum(t.nbytes for t in (*tensors.values(), *part.buffers())) - streamed
    if name == "vae":
        value = next(iter(tensors.values())).element_size()
        kept += packed_bytes_of({n: p.shape for n, p in tensors.items()}, value, cuda=True, encodes=True)
    return PartSize(name, kept, found)


def units(name: str, part: nn.Module) -> dict[str, list[list[str]]]:
    """Of the parts that can be streamed."""
    if name not in ("transformer", "text_encoder"):
        return {}
    return units_of({n: p.shape for n, p in part.named_parameters()})


def text_layers(text_encoder: Any) -> Any:
    """The decoder layers of Qwen2.5-VL."""
    return text_encoder.model.language_model.layers


def said(plan: Plan) -> list[str]:
    """For the report."""
    found = [f"memory: {gb(plan.peak)} of {gb(plan.limit)} by the plan"]
    for track, often in (("blocks", "step"), ("layers", "prompt"), ("modulation", "schedule")):
        if size := plan.streamed(track):
            found.append(f"memory: {gb(size)} of {track} are streamed for every {often}")
    return found
