"""What a task is: the part of a run that knows what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from qwen_image_fast.training.producer.backend import BatchMaker


class StopRun(RuntimeError):
    """A sentence about why a run must not go on."""


@dataclass
class Losses:
    """total: what is differentiated, a mean over samples. per_sample: [samples] float32, of the batch's samples.

    flops: of forward and backward, where they are known. extra: further numbers for the log. levels: the noise level of
    each sample, where there is one.
    """

    total: Tensor
    per_sample: Tensor
    tokens: int
    extra: dict[str, float]
    flops: float = 0.0
    levels: Sequence[float] = ()


@dataclass
class Drawn:
    """title: what was asked for. pictures: uint8 [H, W, 3], of which the last was made and the others were given."""

    title: str
    pictures: Sequence[np.ndarray]


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

    def samples(self) -> list[Drawn]:
        """Pictures to look at, the same ones at every step; none where the recipe asks for none."""

    def keep(self, folder: Path, step: int) -> Path | None:
        """Write what was trained so far into the folder of a run, in the form in which it is used, where that is
        small: adapters. The modules hold the averaged weights."""

    def export(self, folder: Path) -> None:
        """Write what was trained in the layout in which it is used; the modules hold the averaged weights."""


@runtime_checkable
class Collects(Protocol):
    """A task that makes what it learns from with the weights as they are, and so has more to remember than they."""

    def collect(self, batches: Sequence[Any], doing: Callable[[str], Any]) -> dict[str, float]:
        """Before an update: make what it and the next ones learn from, where that is due; numbers for the log, none
        where nothing was made. doing: is told what goes on, with how much of it is done.

        Raises:
            StopRun: the run must not go on, as what it collects shows.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold of it beside the weights: tensors by name, and what JSON can hold."""

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None: ...

    def said(self) -> list[str]:
        """Sentences for whoever follows the run, since this was last asked."""
