"""Duplicates: the same bytes, and pictures that look the same; of each group the best stays.

Which records are compared is known only when every other filter has spoken, so these two judge no picture by itself:
`perceptual_hash` is taken where the picture is decoded, and the rest works on numbers of all survivors at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from .picture import Picture
from .quality import RgbEntropy

_SIDE, _KEPT = 32, 8
_BITS = 64
LARGEST_DISTANCE = 7
PLAIN = 2.5  # bits of `quality.RgbEntropy`, whatever the recipe lets pass
_STRETCH = 2**16


def comparable_hash(picture: Picture, min_entropy: float) -> int | None:
    """The hash of a picture; None where it is nearly plain: its hash then says where in it something is, not what, and
    pictures that have nothing in common meet.

    Args:
        min_entropy: bits of `quality.RgbEntropy`; a picture of less is nearly plain.
    """
    if RgbEntropy(min_entropy).judge(picture).reason is not None:
        return None
    return perceptual_hash(picture.luma)


def best_of(groups: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64 [n]: for each record the one of its group that ranks first.

    Args:
        groups: int [n], the number of each record's group.
        rank: int64 [n], each value once; the smallest is the best.
    """
    order = np.lexsort((rank, groups))
    sorted_groups = groups[order]
    starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]]) if len(order) else order
    best = np.empty(len(groups), np.int64)
    best[order] = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    return best


def masks(radius: int) -> list[int]:
    """Sets of bits such that hashes within `radius` bits agree in at least one set whole.

    64 bits are cut into radius + 2 pieces: at most `radius` of them differ, so two are the same. A set is two pieces;
    after the multi-index hashing of Norouzi, Punjani and Fleet (CVPR 2012), with longer keys and no neighbours of keys
    to look up.
    """
    edges = [round(place * _BITS / (radius + 2)) for place in range(radius + 3)]
    pieces = [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)]
    return [one | other for one, other in itertools.combinations(pieces, 2)]


def near_pairs(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(first, second, bits that differ) of all pairs within `radius` bits, each pair once.

    Args:
        hashes: uint64 [n], each value once.
    """
    chosen = [np.uint64(mask) for mask in masks(radius)]
    for number, mask in enumerate(chosen):
        order = np.argsort(hashes & mask, kind="stable")
        yield from pairs_within(hashes[order], order, chosen[: number + 1], radius)


def pairs_within(
    hashes: np.ndarray, numbers: np.ndarray, chosen: list[np.uint64], radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of neighbours that agree in the last of `chosen`, by which `hashes` are sorted, and in none before it."""
    keys, at, step = hashes & chosen[-1], np.arange(len(hashes)), 1
    while len(at := at[: np.searchsorted(at, len(hashes) - step)]):
        at = at[keys[at] == keys[at + step]]
        other = hashes[at] ^ hashes[at + step]
        bits = bits_of(other)
        new = bits <= radius
        for mask in chosen[:-1]:
            new &= (other & mask) != 0
        if new.any():
            yield numbers[at[new]], numbers[at[new] + step], bits[new]
        step += 1


def bits_of(values: np.ndarray) -> np.ndarray:
    """uint8: how many bits of each uint64 are set."""
    found = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    found = (found & np.uint64(0x3333333333333333)) + ((found >> np.uint64(2)) & np.uint64(0x3333333333333333))
    found = (found + (found >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((found * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def leaders(
    rank: np.ndarray, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n], int16 [n]): whom each goes for, -1 where it stays; bits to the nearest better one that stays, or -1.

    From the best to the worst, one goes that is within `distance` bits of a better one that stays. So each that goes
    has its better copy in the result, and a chain of pictures, each a little like the next, does not fall together.

    Args:
        rank: int64 [n], each value once.
        pairs: as of `near_pairs`, all of them.
    """
    first, second, bits = pairs
    better = np.where(rank[first] < rank[second], first, second)
    worse = np.where(rank[first] < rank[second], second, first)
    order = np.lexsort((rank[better], bits, rank[worse]))
    goes_for, nearest = np.full(len(rank), -1, np.int64), np.full(len(rank), -1, np.int16)
    for start in range(0, len(order), _STRETCH):
        stretch = order[start : start + _STRETCH]
        for low, high, apart in zip(worse[stretch].tolist(), better[stretch].tolist(), bits[stretch].tolist()):
            if goes_for[high] < 0 and nearest[low] < 0:
                nearest[low] = apart
                if apart <= distance:
                    goes_for[low] = high
    return goes_for, nearest


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
