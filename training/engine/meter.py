"""Means and speeds of the steps between two log lines."""

from __future__ import annotations

import time
from collections.abc import Sequence


class Meter:
    """Means and speeds between two log lines. peak: operations per second that the devices could do, if known."""

    def __init__(self, peak: float | None = None) -> None:
        self.start, self.peak = time.perf_counter(), peak
        self.waited, self.steps, self.images, self.tokens, self.flops, self.rejected = 0.0, 0, 0, 0, 0.0, 0
        self.sums: dict[str, float] = {}
        self.levels: dict[str, list[float]] = {}

    def add(self, losses: dict[str, float], images: int, samples: Sequence[tuple[float, float]] = ()) -> None:
        """samples: noise level and loss of each."""
        self.steps += 1
        self.images += images
        self.tokens += int(losses["tokens"])
        self.flops += losses["flops"]
        self.rejected += int(losses["rejected"])
        for sigma, loss in samples:
            fourth = min(int(sigma * 4), 3) / 4
            self.levels.setdefault(f"loss_noise_{fourth}_{fourth + 0.25}", []).append(loss)
        for name, value in losses.items():
            if name not in ("tokens", "flops", "rejected"):
                self.sums[name] = self.sums.get(name, 0.0) + value

    def values(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.start, 1e-9)
        by_level = {name: sum(losses) / len(losses) for name, losses in sorted(self.levels.items())}
        return {name: value / self.steps for name, value in self.sums.items()} | {
            **by_level,
            "images_per_s": self.images / seconds,
            "tokens_per_s": self.tokens / seconds,
            **({"tflops": self.flops / seconds / 1e12} if self.flops else {}),
            **({"mfu": self.flops / seconds / self.peak} if self.flops and self.peak else {}),
            "data_wait": self.waited / seconds,
            "rejected": self.rejected,
        }
