"""Stage 1, duplicates: the same bytes, and pictures that look the same; both remember on disk, not in memory."""

from __future__ import annotations

import itertools
import sqlite3
from functools import lru_cache
from pathlib import Path

import numpy as np

from .base import Filter, Verdict
from .picture import Picture
from .quality import RgbEntropy

_SIDE, _KEPT = 32, 8
_BANDS, _BAND_BITS = 4, 16
LARGEST_DISTANCE = 2 * _BANDS - 1


def _open(folder: Path, name: str) -> sqlite3.Connection:
    """A new table on disk; it only serves one run, so nothing is spent on surviving a crash."""
    path = folder / f"{name}.sqlite"
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA cache_size = -65536")  # KiB
    return database


class ExactDuplicate(Filter):
    """Rejects a file whose sha256 has come before; score: 1 for a duplicate, else 0.

    Args:
        folder: for the index, on disk.
    """

    name, stage = "exact_duplicate", 1

    def __init__(self, folder: Path):
        self._seen = _open(folder, self.name)
        self._seen.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY, origin TEXT) WITHOUT ROWID")

    def judge(self, picture: Picture) -> Verdict:
        digest = bytes.fromhex(picture.record.id)
        found = self._seen.execute("SELECT origin FROM seen WHERE hash = ?", (digest,)).fetchone()
        if found:
            return Verdict(1.0, f"the file is the same as {found[0]}")
        self._seen.execute("INSERT INTO seen VALUES (?, ?)", (digest, picture.record.origin))
        return Verdict(0.0)


class NearDuplicate(Filter):
    """Rejects a picture whose perceptual hash is within `distance` bits of an earlier one's; score: that distance.

    The index is multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012): of four bands of 16 bits, a hash within 7
    bits has one within 1 bit, so 4 x 17 exact look-ups find every neighbour, and no others are compared than those that
    share a band. Score: None where none shares a band, and for a picture that is nearly plain: its hash says where in
    it something is, not what, and pictures that have nothing in common meet. Such pictures are not compared at all.

    Args:
        folder: for the index, on disk.
        distance: 0 to 7 bits.
        min_entropy: bits of `quality.RgbEntropy`; a picture of less is nearly plain.
    """

    name, stage = "near_duplicate", 1

    def __init__(self, folder: Path, distance: int, min_entropy: float = 2.5):
        if not 0 <= distance <= LARGEST_DISTANCE:
            raise ValueError(f"near_duplicate: distance must be 0 to {LARGEST_DISTANCE} bits, got {distance}")
        self._distance, self._entropy = distance, RgbEntropy(min_entropy)
        self._seen = _open(folder, self.name)
        self._seen.execute("CREATE TABLE seen (band INTEGER, hash INTEGER, origin TEXT)")
        self._seen.execute("CREATE INDEX bands ON seen (band)")
        # Each band's own part of the key keeps the bands apart in one index.
        flips = [0, *(1 << bit for bit in range(_BAND_BITS))] if distance >= _BANDS else [0]
        self._flips = [(band, flip) for band, flip in itertools.product(range(_BANDS), flips)]
        self._query = f"SELECT DISTINCT hash, origin FROM seen WHERE band IN ({','.join('?' * len(self._flips))})"

    def judge(self, picture: Picture) -> Verdict:
        if self._entropy.judge(picture).reason is not None:
            return Verdict(None)
        value = perceptual_hash(picture.luma)
        parts = [value >> (_BAND_BITS * band) & 0xFFFF for band in range(_BANDS)]
        keys = [band << _BAND_BITS | parts[band] ^ flip for band, flip in self._flips]
        found = self._seen.execute(self._query, keys)
        near = min(((((other % 2**64) ^ value).bit_count(), origin) for other, origin in found), default=None)
        if near and near[0] <= self._distance:
            return Verdict(float(near[0]), f"it looks like {near[1]}: {near[0]} of 64 bits differ")
        signed = value - 2**64 if value >= 2**63 else value
        rows = [(band << _BAND_BITS | part, signed, picture.record.origin) for band, part in enumerate(parts)]
        self._seen.executemany("INSERT INTO seen VALUES (?, ?, ?)", rows)
        return Verdict(float(near[0]) if near else None)


def perceptual_hash(luma: np.ndarray) -> int:
    """64 bits: which of the 8 x 8 lowest DCT-II coefficients of the 32 x 32 picture are above their median.

    The mean coefficient is left out of the median and of the hash, whose last bit is 0.

    Args:
        luma: float32 [height, width], 0 to 255.
    """
    height, width = luma.shape
    coefficients = (_basis(height) @ luma @ _basis(width).T).ravel()[1:]
    bits = coefficients > np.median(coefficients)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@lru_cache(256)
def _basis(size: int) -> np.ndarray:
    """float32 [8, size]: the means of 32 equal parts of a line, then the DCT-II, cos(pi k (2 n + 1) / 64)."""
    k, n = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    edges, pixels = np.arange(_SIDE + 1)[:, None] * size / _SIDE, np.arange(size)
    overlaps = np.clip(np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels), 0, None)
    return (np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE)) @ overlaps * (_SIDE / size)).astype(np.float32)
