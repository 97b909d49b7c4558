"""How the processes of a launcher, or of a server, find each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Processes of this run, as torchrun and other launchers say in WORLD_SIZE; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def join(device: torch.device, timeout: float, **where: Any) -> None:
    """Join the other processes, if that is not done; with gloo, and NCCL for tensors of a GPU.

    Args:
        timeout: seconds after which a collective operation that some rank does not join fails.
        where: of `init_process_group`: who is who. Nothing: the launcher's MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **where)
