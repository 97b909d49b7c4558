"""The models of a pipeline on a GPU that they do not fit on: what fits stays there, the rest is streamed from the host.

Shared by the drop-in's `memory_limit` and by offloading under diffusers' names. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qwen_image_fast.models.streaming import refuse_moves, stream_layers, stream_tensors, units_of
from qwen_image_fast.models.vae_conv import packed_bytes_of
from qwen_image_fast.weights.cuda_lane import CudaLane, CudaStreams
from qwen_image_fast.weights.plan import PartSize, Plan, make_plan, working_bytes
from qwen_image_fast.weights.ring import Ring

CPU = torch.device("cpu")


def is_streamed(part: Any) -> bool:
    return getattr(part, "streamed", None) is not None


def plan_of(parts: Mapping[str, nn.Module], limit: int | None, base: int) -> Plan:
    """What of models in memory would stay under `limit` bytes; None: as little as can be.

    ValueError: the limit is too small.
    """
    transformer: Any = parts["transformer"]
    weight = transformer.img_in.weight
    working = working_bytes(len(weight), len(transformer.transformer_blocks), weight.element_size())
    return make_plan([part_size(name, part) for name, part in parts.items()], limit, base, working)


def stream_parts(parts: Mapping[str, nn.Module], plan: Plan, device: torch.device) -> None:
    """Put models of the host's memory on `device` by a plan, "transformer" and "text_encoder" with streamed units."""
    if not plan.streams:
        for part in parts.values():
            part.to(device)
        return
    ring = Ring(plan.buffer, plan.buffers, CudaLane(CudaStreams(device)) if device.type == "cuda" else None)
    for name, part in parts.items():
        stays = {track: units for (own, track), units in plan.stays.items() if own == name}
        streamed = stream_tensors(part, ring, stays if units(name, part) else {}, device)
        if streamed.unit_of:
            part.__dict__["streamed"] = streamed
            refuse_moves(part)
        if name == "text_encoder":
            stream_layers(streamed, text_layers(part))


def restore_parts(parts: Mapping[str, nn.Module]) -> bool:
    """All weights in memory of the host again; False if none was streamed."""
    found = False
    for part in parts.values():
        if is_streamed(part):
            part.__dict__["streamed"].end()
            part.__dict__["streamed"] = None
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
    """The decoder layers of Qwen2.5-VL, with its head or without."""
    return getattr(text_encoder, "model", text_encoder).language_model.layers
