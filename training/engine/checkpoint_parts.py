"""What a checkpoint holds that several processes wrote, each its part (parallel/checkpoints.py)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader


def sizes(path: Path) -> dict[str, torch.Size]:
    """What a checkpoint holds, by its name in the files."""
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except Exception as error:
        raise ValueError(f"resume: {path} is damaged ({error}); remove it to resume from the one before") from error
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def load_whole(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in parts, in this process."""
    reader = HuggingFaceStorageReader(str(path))
    found = {name: torch.empty(size, dtype=torch.float32) for name, size in sizes(path).items()}
    dcp.load(dict(found), storage_reader=reader, no_dist=True)
    return found
