"""The quantised weights that bitsandbytes writes into safetensors files.

    L.weight            uint8 [n / 2, 1], or the same bytes as another type: two 4-bit numbers, the high one first
    L.weight.absmax     float32 of a block of `blocksize` values; or uint8, then coded itself:
                        absmax = nested_quant_map[absmax] * nested_absmax[256 at a time] + nested_offset
    L.weight.quant_map  float32 [16]; w = quant_map[q] * absmax
    L.weight.quant_state.bitsandbytes__nf4, __fp4    bytes of json: shape, blocksize, nested_blocksize, nested_offset
    L.weight int8, L.SCB float32 [rows]              LLM.int8: w = q * SCB * float32(1 / 127)

Source: https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.tensor_files import Entry
from qwen_image_fast.weights.reading import read_entry
from qwen_image_fast.weights.stored import Decode, Part, StoredWeight, look_up

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")


def take_bitsandbytes(rest: dict[str, Entry]) -> dict[str, StoredWeight]:
    """Take bitsandbytes' weights out of `rest`; ValueError where their parts do not fit each other."""
    found = {}
    for name in list(rest):
        if match := STATE.fullmatch(name):
            found[match[1]] = _four_bits(rest, match[1], match[2])
        elif name.endswith(".SCB") and f"{name.removesuffix('.SCB')}.weight" in rest:
            weight = f"{name.removesuffix('.SCB')}.weight"
            found[weight] = _eight_bits(rest, weight, name)
    return found


def _error(path: Any, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: {what}; download or convert it again")


def _four_bits(rest: dict[str, Entry], name: str, kind: str) -> StoredWeight:
    state = rest.pop(f"{name}.quant_state.bitsandbytes__{kind}")
    try:
        settings = json.loads(read_entry(state).numpy().tobytes())
        shape, block = tuple(map(int, settings["shape"])), int(settings["blocksize"])
        nested = int(settings.get("nested_blocksize", 0))
        offset = float(settings.get("nested_offset", 0.0))
    except (ValueError, TypeError, KeyError) as error:
        raise _error(state.path, f"the state of {name} is not what bitsandbytes writes") from error
    tensors = {"weight": rest.pop(name, None)}
    for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        tensors[role] = rest.pop(f"{name}.{role}", None)
    there = {role: entry for role, entry in tensors.items() if entry is not None}
    count = math.prod(shape)
    blocks = -(-count // block)
    wanted = {"weight": count // 2, "absmax": 4 * blocks, "quant_map": 64}
    if nested:
        wanted |= {"absmax": blocks, "nested_absmax": 4 * -(-blocks // nested), "nested_quant_map": 1024}
    if there.keys() != wanted.keys() or any(there[role].nbytes != size for role, size in wanted.items()):
        sizes = ", ".join(f"{role} {there[role].nbytes if role in there else 'missing'}" for role in wanted)
        raise _error(state.path, f"the parts of {name} do not go with its shape {list(shape)} (bytes: {sizes})")
    if count % block:
        raise _error(state.path, f"{name} has {count} values, not a multiple of its blocks of {block}")
    packed = there["weight"]._replace(dtype=torch.uint8, shape=(blocks, block // 2))
    parts = {"weight": Part(packed, 1), **{role: Part(e) for role, e in there.items() if role != "weight"}}
    return StoredWeight(f"bitsandbytes {kind}", shape, block, parts, _decoder(nested, offset))


def _decoder(nested: int, offset: float) -> Decode:
    def decode(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
        packed = parts["weight"]
        q = torch.stack([packed >> 4, packed & 15], -1).flatten(1)
        absmax = parts["absmax"][first : first + len(q)]
        if nested:
            block = torch.arange(first, first + len(q), device=q.device) // nested
            absmax = look_up(parts["nested_quant_map"], absmax) * parts["nested_absmax"][block] + offset
        return look_up(parts["quant_map"], q).mul_(absmax[:, None]).to(dtype)

    return decode


def _eight_bits(rest: dict[str, Entry], name: str, scales: str) -> StoredWeight:
    weight, absmax = rest.pop(name), rest.pop(scales)
    rest.pop(f"{name.removesuffix('.weight')}.weight_format", None)
    if weight.dtype != torch.int8 or len(weight.shape) != 2 or absmax.shape != weight.shape[:1]:
        what = f"{name} is {weight.kind} {list(weight.shape)} with {scales} {list(absmax.shape)}"
        raise _error(weight.path, what)
    parts = {"weight": Part(weight, 1), "absmax": Part(absmax, 1)}
    return StoredWeight("bitsandbytes int8", weight.shape, weight.shape[1], parts, _rows)


def _rows(parts: Mapping[str, Tensor], first: int, dtype: torch.dtype) -> Tensor:
    return (parts["weight"] * parts["absmax"][:, None] * 7.874015718698502e-3).to(dtype)
