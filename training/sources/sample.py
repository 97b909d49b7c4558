"""What a source gives, and what a source is: a function of (seed, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwen_image_fast.training.synthesis.sample import EditSample
from qwen_image_fast.training.synthesis.sample import Sample as DrawnSample


@dataclass
class Sample:
    """image: uint8 [H, W, 3]. caption: describes it, or says how it comes from `references`, 0..N images.

    origin: which file or record it is; empty where it was drawn. mask: uint8 [H, W], 255 where the loss counts and
    0 where it does not; None: everywhere. drawn: what the synthesis knows of it, where it was drawn by that.
    """

    image: np.ndarray
    caption: str
    references: Sequence[np.ndarray] = ()
    origin: str = ""
    mask: np.ndarray | None = None
    drawn: DrawnSample | EditSample | None = None


class Source(Protocol):
    """A source of edits has a method `edit` like `sample`, whose samples have references. One that holds pictures out
    has `held_places` and a method `held_out`; one that draws others for another seed needs neither."""

    def sample(self, seed: int, index: int) -> Sample:
        """Sample `index` of the stream of `seed`, an image and its caption: always the same one."""
