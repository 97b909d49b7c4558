"""What a task is: the part of a run that knows what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qwen_image_fast.training.producer.backend import BatchMaker


@dataclass
class Losses:
    """total: what is differentiated, a mean over samples. per_sample: [samples] float32, of the batch's samples.

    flops: of forward and backward, where they are known. extra: further numbers for the log.
    """

    total: Tensor
    per_sample: Tensor
    tokens: int
    extra: dict[str, float]
    flops: float = 0.0


class Task(Protocol):
    """What a run trains."""

    modules: dict[str, nn.Module]  # those with trainable weights, by the name they have in checkpoints
    maker: BatchMaker
    device: torch.device

    def enter(self, number: int) -> None:
        """Go on with a stage of the run."""

    def loss(self, batch: Any) -> Losses: ...

    def describe(self, batch: Any, index: int) -> str:
        """A few words that let a person find sample `index`."""

    def validate(self) -> dict[str, float]: ...

    def sample_grid(self) -> np.ndarray | None: ...

    def export(self, folder: Path) -> None:
        """Write what was trained in the layout in which it is used; the modules hold the averaged weights."""


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU, where most machines emulate bfloat16 slowly."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def grid(images: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Images uint8 [H, W, 3] of one size side by side, white where there is none."""
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    out = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        out[y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    return out
