"""What stays in memory under a limit, and what is streamed.

    peak = base + working + kept + buffers + what stays of the units

base      what the process holds before: Python, torch and its libraries; on a GPU the context
working   activations of one picture of 1328 x 1328 with guidance, and the modulation vectors of 50 steps:
          12 tensors of [rows, width], 50 of [12 blocks, width], 67 MB of libraries; decoding is bounded to as much
kept      the VAE, embeddings, projections in and out, norms and biases
buffers   3, or 2 where there is no room, of the largest unit
units     blocks of the transformer, used at every step, stay first; layers of the text encoder, used once for a
          prompt, stay where memory is left; modulation weights, used once for a schedule, stay only if all does

A step takes the longer of computing all blocks and reading the streamed ones, if the blocks that stay lie between them:
so they are spread evenly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwen_image_fast.picture_memory import OVERHEAD, denoising_bytes
from qwen_image_fast.sizes import gb

PIXELS, TEXT_ROWS, STEPS = 1328, 256, 50
DISK_RATE = 2.0e9  # bytes per second that a plan counts on
# Tracks in the order in which their units stay, and how often they are read.
EVERY = {"blocks": "step", "layers": "prompt", "modulation": "schedule"}


def working_bytes(width: int, blocks: int, itemsize: int, pixels: int = PIXELS, branches: int = 2) -> int:
    """Of one square picture, with guidance or without, and what libraries keep."""
    rows = branches * ((pixels // 16) ** 2 + TEXT_ROWS)
    return OVERHEAD + denoising_bytes(width, blocks, itemsize, rows, STEPS)


@dataclass(frozen=True)
class PartSize:
    """Bytes of a part: what is always kept, and its units by track."""

    name: str
    kept: int
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.kept + sum(sum(sizes) for sizes in self.units.values())


@dataclass(frozen=True)
class Plan:
    """See above. stays: units of (part, track); `None`: nothing is streamed."""

    limit: int
    base: int
    working: int
    parts: Sequence[PartSize]
    buffers: int = 0
    buffer: int = 0
    stays: Mapping[tuple[str, str], frozenset[int]] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        return self.buffers > 0

    def streamed(self, track: str) -> int:
        """Bytes that are read whenever a track is used."""
        return sum(
            size
            for part in self.parts
            for i, size in enumerate(part.units.get(track, ()))
            if self.streams and i not in self.stays[part.name, track]
        )

    @property
    def peak(self) -> int:
        units = sum(part.total - part.kept for part in self.parts) - sum(map(self.streamed, EVERY))
        kept = sum(part.kept for part in self.parts)
        return self.base + self.working + kept + self.buffers * self.buffer + units

    def rows(self) -> list[tuple[str, str]]:
        """What and how much, for people."""
        rows = [("process before loading", gb(self.base)), ("activations, decoding", gb(self.working))]
        for part in self.parts:
            rows.append((f"{part.name}, kept", gb(part.kept)))
            for track, sizes in part.units.items():
                left = self.stays.get((part.name, track), frozenset(range(len(sizes))))
                size = sum(sizes[i] for i in left)
                rows.append((f"{part.name}, {track}", f"{gb(size)}, {len(left)} of {len(sizes)} stay"))
        if self.streams:
            rows.append(("buffers", f"{gb(self.buffers * self.buffer)}, {self.buffers} of {gb(self.buffer)}"))
        rows.append(("peak", f"{gb(self.peak)} of {gb(self.limit)}"))
        for track, often in EVERY.items():
            if size := self.streamed(track):
                rows.append((f"read for every {often}", f"{gb(size)}, {size / DISK_RATE:.1f} s at {gb(DISK_RATE)}/s"))
        return rows


def make_plan(parts: Sequence[PartSize], limit: int | None, base: int, working: int) -> Plan:
    """What stays under `limit`; all of it where that fits. None: the least limit.

    Raises:
        ValueError: not even two buffers fit beside what is kept.
    """
    kept = base + working + sum(part.kept for part in parts)
    buffer = max((size for part in parts for sizes in part.units.values() for size in sizes), default=0)
    least = kept + 2 * buffer
    limit = least if limit is None else limit
    whole = Plan(limit, base, working, parts)
    if whole.peak <= limit:
        return whole
    if limit < least or not buffer:
        needed = least if buffer else whole.peak
        raise ValueError(
            f"memory_limit must be at least {_up(needed)}, got {gb(limit)}: the process takes {gb(base)}, activations "
            f"{gb(working)}, what is always kept {gb(kept - base - working)}, two buffers of a block {gb(2 * buffer)}"
        )
    buffers = 3 if limit >= kept + 3 * buffer else 2
    left = limit - kept - buffers * buffer
    stays: dict[tuple[str, str], frozenset[int]] = {}
    for track in EVERY:
        for part in parts:
            sizes = part.units.get(track, ())
            count = 0 if track == "modulation" or not sizes else min(len(sizes), left // max(sizes))
            stays[part.name, track] = spread(count, len(sizes))
            left -= sum(sizes[i] for i in stays[part.name, track])
    return Plan(limit, base, working, parts, buffers, buffer, stays)


def spread(count: int, of: int) -> frozenset[int]:
    """Which `count` units of a track stay, so that the others lie as far apart as they can."""
    streamed = of - count
    return frozenset(range(of)) - {int((j + 0.5) * of / streamed) for j in range(streamed)}


def _up(size: int) -> str:
    """Not less than `size`, as a limit may be written."""
    return f"{-(-size // 10**8) / 10:.1f}GB" if size >= 10**9 else f"{-(-size // 10**6)}MB"
