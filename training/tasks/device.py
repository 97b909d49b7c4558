"""Where and in which type a run computes."""

from __future__ import annotations

import platform

import torch


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU, where most machines emulate bfloat16 slowly."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the processor multiplies numbers of this type by converting them; False where torch does not say."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    units = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return platform.machine() == "x86_64" and all(unit is not None and not unit() for unit in units)
