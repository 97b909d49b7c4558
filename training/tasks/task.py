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
    # Origin and reason of samples that could not be used for validation and sample grids, since it was last emptied.
    rejected: list[tuple[None, str, str]]

    def enter(self, number: int) -> None:
        """Go on with a stage of the run."""

    def loss(self, batch: Any) -> Losses: ...

    def describe(self, batch: Any, index: int) -> str:
        """A few words that let a person find sample `index`."""

    def validate(self) -> dict[str, float]: ...

    def sample_grid(self) -> np.ndarray | None: ...

    def export(self, folder: Path) -> None:
        """Write what was trained in the layout in which it is used; the modules hold the averaged weights."""
