"""Random numbers as a pure function of (seed, step, sample, purpose): no state to save, nothing to lose at a kill.

The noise of a sample does not depend on which process draws it, in which order, or in a batch of which size; that makes
a resumed run bit-equal to one that was never stopped, and a run on several devices equal to one on a single device.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # what looks at data draws too, before torch is loaded
    import torch


def key(*parts: int | str) -> int:
    """128 bits of the BLAKE2b hash of the parts: the key of a stream."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *, step: int = 0, sample: int = 0) -> np.random.Generator:
    """Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by the four numbers."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, step, sample)))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *, step: int = 0, sample: int = 0) -> torch.Tensor:
    """Standard normal values, float32 on the CPU."""
    import torch

    values = generator(seed, purpose, step=step, sample=sample).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)


def epoch_position(seed: int, position: int, length: int) -> int:
    """The entry of a data set of `length` at a position of the endless stream: every epoch is a new permutation."""
    epoch, offset = divmod(position, length)
    return int(_permutation(seed, epoch, length)[offset])


@lru_cache(maxsize=8)  # a mixture draws from several data sets in turn
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return generator(seed, "epoch", step=epoch, sample=length).permutation(length)
