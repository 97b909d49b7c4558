"""How much memory weights take, how much there is, and what to say where they do not fit."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from qwen_image_fast.sizes import GB, gb
from qwen_image_fast.tensor_files import Entry, is_mapped
from qwen_image_fast.weights.stored import Weight, is_floating

logger = logging.getLogger(__name__)
CONTEXT = 600 * 10**6  # bytes that a CUDA context takes, an assumption


class Need(NamedTuple):
    """Bytes of weights: those that are read or made, and those that are pages of a file, which can be given back."""

    own: int
    mapped: int


def weight_bytes(weight: Weight, dtype: torch.dtype | None) -> int:
    """What a weight takes in memory as `dtype`; None: as stored, bfloat16 if it is quantised."""
    if not is_floating(weight) or (isinstance(weight, Entry) and dtype is None):
        return weight.nbytes
    return math.prod(weight.shape) * (dtype or torch.bfloat16).itemsize


def need_of(weights: Iterable[Weight], dtype: torch.dtype | None, device: torch.device) -> Need:
    """What `load_state_into` makes of them."""
    own = mapped = 0
    for weight in weights:
        if isinstance(weight, Entry) and is_mapped(weight, dtype, device):
            mapped += weight.nbytes
        else:
            own += weight_bytes(weight, dtype)
    return Need(own, mapped)


def free_bytes(device: torch.device) -> int | None:
    """What can still be taken: of a GPU, or without swapping of the machine and the control group; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [_field("/proc/meminfo", "MemAvailable:"), *_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min((value for value in found if value is not None), default=None)


def resident_bytes() -> int:
    """What this process holds now, pages of files included; 0 where the system does not tell."""
    return _field("/proc/self/status", "VmRSS:") or 0


def _field(path: str, name: str) -> int | None:
    try:
        with open(path) as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(name)), None)
    except OSError:
        return None


def _of_groups(own: Path, root: Path) -> list[int]:
    """What is left to the control groups (version 2) that this process is in; pages of files can be given back."""
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    left = []
    group = root / name.strip("/")
    for folder in (group, *group.parents):
        try:
            limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            left.append(max(0, int(limit) - used + int(stat.get("file", 0))))
    return left


def check_fits(needs: Mapping[str, Need], device: torch.device, free: int | None = None) -> None:
    """Say what does not fit before it is loaded.

    Args:
        needs: of each part. free: bytes; None: as it is now.

    Raises:
        ValueError: what has to be read or made is more than there is; the system would end the process.

    Warns:
        with what is mapped it is more: the system then reads pages again and again.
    """
    free = free_bytes(device) if free is None else free
    if free is None:
        return
    own, mapped = sum(need.own for need in needs.values()), sum(need.mapped for need in needs.values())
    where = "of memory is free" if device.type == "cpu" else f"is free on {device}"
    each = ", ".join(f"{name} {gb(sum(need))}" for name, need in needs.items() if sum(need))
    limit = f'memory_limit="{max(1, int(0.9 * free / GB))}GB"'
    if own > free:
        raise ValueError(
            f"the weights must fit: {gb(own + mapped)} ({each}), but {gb(free)} {where}; load the pipeline with "
            f"{limit} (--memory), which streams what does not fit, or in a smaller type, torch_dtype=torch.bfloat16 "
            "(--dtype bfloat16)"
        )
    if own + mapped > free:
        logger.warning(
            "the weights take %s (%s), but %s %s: they are read from the disk again at every step; %s (--memory) reads "
            "them ahead",
            *(gb(own + mapped), each, gb(free), where, limit),
        )


def same_file(path: os.PathLike) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
