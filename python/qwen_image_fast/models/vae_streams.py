"""Feeding the VAE in parts: a video in chunks of frames, an image in strips of rows. Both give what the whole gives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrameStream:
    """What each layer remembers of a video that is fed to it chunk by chunk: its last input frames.

    One object belongs to one pass over one video. Layers are its keys, so nothing depends on the order of calls.
    """

    def __init__(self) -> None:
        self.first_chunk = True
        self._frames: dict[nn.Module, Tensor] = {}

    def join(self, layer: nn.Module, x: Tensor, keep: int) -> Tensor:
        """Return `x [B, C, T, H, W]` behind the frames kept for `layer`, and keep the last `keep` frames of that."""
        if layer in self._frames:
            x = torch.cat([self._frames[layer], x], dim=2)
        # A view would hold the whole chunk of every layer in memory until the next one.
        self._frames[layer] = x[:, :, -keep:].clone()
        return x


def run_in_chunks(network: nn.Module, chunks: Iterable[Tensor]) -> Tensor:
    """Feed consecutive chunks of one video through `network` and concatenate the results in time."""
    stream = FrameStream()
    out = []
    for chunk in chunks:
        out.append(network(chunk, stream))
        stream.first_chunk = False
    return torch.cat(out, dim=2)


class RowStream:
    """What each layer remembers of an image that is fed to it strip by strip, from top to bottom.

    A 3x3 convolution gives row y once it has row y + 1, so each layer lags behind the one in front of it, and keeps
    the rows that it will need again. Nothing is computed twice, and no tile sees an edge that the image does not have.
    A strip may give no rows at all.
    """

    def __init__(self) -> None:
        self.last_strip = False
        self._rows: dict[Hashable, Tensor] = {}

    def window(self, layer: nn.Module, x: Tensor, above: int = 1, step: int = 1) -> Tensor:
        """The rows from which a convolution of 3 rows, `step` apart, computes all that it can by now.

        Args:
            x: `[B, C, H, W]`, the next rows.
            above: rows of zeros above the image; below it there is one.
        """
        if layer not in self._rows:
            self._rows[layer] = x.new_zeros(x.shape[0], x.shape[1], above, x.shape[3])
        rows = join_rows(self._rows[layer], x)
        if self.last_strip:
            rows = F.pad(rows, (0, 0, 0, 1))
        count = max(0, (rows.shape[2] - 3) // step + 1)
        self._rows[layer] = _copy(rows[:, :, count * step :])
        return rows[:, :, : (count - 1) * step + 3] if count else rows[:, :, :0]

    def delay(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """Of all rows of `x` so far, the next `count`; the rest waits."""
        if (layer, "delay") in self._rows:
            x = join_rows(self._rows[layer, "delay"], x)
        self._rows[layer, "delay"] = _copy(x[:, :, count:])
        return x[:, :, :count]


def join_rows(above: Tensor, below: Tensor) -> Tensor:
    """Concatenate rows of images, keeping channels last."""
    return torch.cat([t.permute(0, 2, 3, 1) for t in (above, below)], dim=1).permute(0, 3, 1, 2)


def _copy(x: Tensor) -> Tensor:
    """A view would hold the whole strip in memory until the next one."""
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def run_in_strips(network: Callable[[Tensor, RowStream], Tensor], x: Tensor, strip: int, height: int) -> Tensor:
    """Feed `strip` rows of `x [B, C, H, W]` at a time through `network`, which makes `height` rows of all of them."""
    stream, out, done = RowStream(), x.new_empty(0), 0
    for top in range(0, x.shape[2], strip):
        stream.last_strip = top + strip >= x.shape[2]
        rows = network(x[:, :, top : top + strip], stream)
        if top == 0:
            batch, channels, _, width = rows.shape
            out = rows.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
        out[:, :, done : done + rows.shape[2]] = rows
        done += rows.shape[2]
    return out
