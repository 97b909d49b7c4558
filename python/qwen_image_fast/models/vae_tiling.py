"""The VAE on images larger than memory: strips of rows, which are exact, and diffusers' blended tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.models.vae_checks import error
from qwen_image_fast.picture_memory import decoding_bytes


def strip_rows(config: Mapping[str, Any], height: int, width: int, element: int, limit: int) -> int | None:
    """How many rows of the latent to compute at a time, so that one image takes at most `limit` bytes; None: all.

    Counted are the activations, the image and its copy; not the parameters and what is kept of them.

    Args:
        height, width: of the latent. element: bytes of a value.

    Raises:
        ValueError: `limit` is less than a single row of the latent takes.
    """

    def needed(rows: int) -> int:
        return decoding_bytes(config, height, width, element, rows)

    if needed(height) <= limit:
        return None
    if needed(1) > limit:
        scale = 2 ** (len(config["dim_mult"]) - 1)
        raise ValueError(
            f"memory_limit must be at least {needed(1)} bytes for an image of {scale * height} x {scale * width}, "
            f"got {limit}"
        )
    rows = 1
    while needed(2 * rows) <= limit:
        rows *= 2
    return rows


def check_tiles(sizes: Mapping[str, int], ratio: int) -> None:
    """ValueError where the sizes that `enable_tiling` takes are no positive multiples of `ratio`, or leave gaps."""
    for name, size in sizes.items():
        if size <= 0 or size % ratio != 0:
            raise error("enable_tiling", f"{name} must be a positive multiple of {ratio}, got {size}")
    for axis in ("height", "width"):
        stride, tile = sizes[f"tile_sample_stride_{axis}"], sizes[f"tile_sample_min_{axis}"]
        if stride > tile:
            raise error(
                "enable_tiling",
                f"tile_sample_stride_{axis} must be at most tile_sample_min_{axis} ({tile}), got {stride}",
            )


def blended_tiles(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: Sequence[int],
    stride: Sequence[int],
    scale: tuple[int, int],
    each: Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], Iterable[Tensor]] = map,
) -> Tensor:
    """Apply `fn` to overlapping tiles of `x [..., H, W]` and join the results, blended where they overlap.

    Args:
        tile, stride: (height, width) of a tile and between the starts of tiles, in positions of `x`.
        scale: `fn` turns s positions into `s * scale[0] // scale[1]`.
        each: applies `fn` to every tile, in order; by default one after another as they are joined.
    """
    tops, lefts = range(0, x.shape[-2], stride[0]), range(0, x.shape[-1], stride[1])
    tiles = [x[..., top : top + tile[0], left : left + tile[1]] for top in tops for left in lefts]
    results = iter(each(fn, tiles))
    rescale = [scale[0] * s // scale[1] for s in stride]
    overlap = [scale[0] * (t - s) // scale[1] for t, s in zip(tile, stride)]
    above: list[Tensor] = []
    rows = []
    for _ in tops:
        row: list[Tensor] = []
        for column, _ in enumerate(lefts):
            piece = next(results)
            if above:
                piece = _blend(above[column], piece, overlap[0], dim=-2)
            if row:
                piece = _blend(row[-1], piece, overlap[1], dim=-1)
            row.append(piece)
        rows.append(torch.cat([piece[..., : rescale[0], : rescale[1]] for piece in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def _blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """Return `after` with its first `overlap` positions along `dim` faded in over the last ones of `before`.

    y[i] = before[-overlap + i] (1 - i / overlap) + after[i] i / overlap, computed in at least float32. The last tile
    of an image may be shorter than `overlap`, which then shrinks to its length.
    """
    overlap = min(after.shape[dim], overlap)
    if overlap == 0:
        return after
    dtype = torch.promote_types(after.dtype, torch.float32)
    fade_in = torch.arange(overlap, dtype=torch.float64, device=after.device) / overlap
    shape = [overlap if axis == after.ndim + dim else 1 for axis in range(after.ndim)]
    old, new = (1 - fade_in).to(dtype).view(shape), fade_in.to(dtype).view(shape)
    mixed = before.narrow(dim, before.shape[dim] - overlap, overlap) * old + after.narrow(dim, 0, overlap) * new
    return torch.cat([mixed.to(after.dtype), after.narrow(dim, overlap, after.shape[dim] - overlap)], dim=dim)
