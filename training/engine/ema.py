"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from qwen_image_fast.training.parallel.layout import local


class EMA:
    """average <- d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...

    The rising decay (Tensorflow's `ExponentialMovingAverage(num_updates)`) lets early averages forget the start. The
    counter n is part of the state: with a counter reset at resume, the average would be overwritten by the weights.

    Args:
        weights: names and tensors; the averages are float32 whatever these are. decay: 0 keeps the average equal to the
            weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.weights = dict(weights)
        self.decay = decay
        self.updates = 0
        self.average = {name: w.detach().float().clone() for name, w in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [w.detach().float() for w in self.weights.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the weights as they are."""
        self.updates = 0
        for name, w in self.weights.items():
            self.average[name].copy_(w)

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Run a block with the averages in `parameters` (the model's, of any type); afterwards the weights again.

        Of a parameter that is split over ranks, this rank's part.
        """
        parameters = {name: local(p.detach()) for name, p in parameters.items()}
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(kept[name])
