"""Copies of the weights that learn: the reference, the policy that drew, a slow average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Policies:
    """Weights by the name of a policy and their own.

    Of adapters a copy is small, and the one from before the first update is the model without them: it adds nothing.

    Args:
        parameters: those that learn.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)
        self.kept: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def keep(self, policy: str) -> None:
        """The weights as they are now."""
        self.kept[policy] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def follow(self, policy: str, share: float) -> None:
        """policy <- share policy + (1 - share) weights; 0 is a copy."""
        for name, p in self.parameters.items():
            self.kept[policy][name].lerp_(p.detach(), 1 - share)

    @contextmanager
    def use(self, policy: str) -> Iterator[None]:
        """Compute with a policy, without gradients; nothing is copied. Not between a forward pass and its backward."""
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.kept[policy][name]
            with torch.no_grad():
                yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def drop(self) -> None:
        self.kept.clear()

    def state(self) -> dict[str, Tensor]:
        return {f"{policy}/{name}": t for policy, own in self.kept.items() for name, t in own.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.kept.clear()
        for full, tensor in state.items():
            policy, _, name = full.partition("/")
            self.kept.setdefault(policy, {})[name] = tensor.to(self.parameters[name])
