"""What a filter is: it looks at a picture and gives a score, and a reason where the picture must go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from .picture import Picture


@dataclass(frozen=True)
class Verdict:
    """score: None where the filter does not apply to the picture. reason: a sentence; None: the picture stays."""

    score: float | None
    reason: str | None = None


class Filter(ABC):
    """One filter of one of the report's seven stages (arXiv 2508.02324, section 3.2).

    Attributes:
        name: of its column in the audit.
        stage: 1 to 7.
    """

    name: ClassVar[str]
    stage: ClassVar[int]

    @abstractmethod
    def judge(self, picture: Picture) -> Verdict:
        """The verdict on a picture that has passed every filter before this one."""


class Measure(Filter):
    """A filter whose score must lie within limits.

    Args:
        low, high: the limits, inclusive; None: none.
    """

    too_low: ClassVar[str] = ""
    too_high: ClassVar[str] = ""

    def __init__(self, low: float | None = None, high: float | None = None):
        self.low, self.high = low, high

    @abstractmethod
    def score(self, picture: Picture) -> float | None:
        """The measured value; None where it means nothing for this picture."""

    def judge(self, picture: Picture) -> Verdict:
        score = self.score(picture)
        if score is None:
            return Verdict(None)
        if self.low is not None and score < self.low:
            return Verdict(score, f"{self.too_low}: {self.name} is {score:.4g}, less than {self.low:g}")
        if self.high is not None and score > self.high:
            return Verdict(score, f"{self.too_high}: {self.name} is {score:.4g}, more than {self.high:g}")
        return Verdict(score)
