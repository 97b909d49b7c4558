"""MSRoPE: the rotary positions of image and text tokens (Qwen-Image report, arXiv 2508.02324, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Positions of the released models' tables on every axis.
POSITIONS = 4096
# (frames, height, width) of one image in tokens; a sample is a list of them, the generated image first.
ImageShape = tuple[int, int, int]


def as_tensor(positions: Sequence[int] | Tensor) -> Tensor:
    """int64; a range is not gone through, so that torch.compile may leave its ends open."""
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, dtype=torch.int64)
    return torch.as_tensor(positions, dtype=torch.int64)


def rotation(positions: Sequence[int] | Tensor, dim: int, theta: float = 10000.0) -> Tensor:
    """cos and sin of position * theta^(-2i / dim) as [positions, dim / 2, 2], in float32 as the reference has it."""
    index = as_tensor(positions)
    frequency = 1.0 / torch.pow(theta, torch.arange(0, dim, 2).to(torch.float32).div(dim))
    angle = torch.outer(index, frequency)
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))


def _centred(length: int) -> range:
    """Positions of one axis: -(n - n // 2) ... n // 2 - 1, the odd one on the negative side."""
    return range(-(length - length // 2), length // 2)


def image_rope(shape: ImageShape, frame: int, axes_dim: Sequence[int]) -> Tensor:
    """The table of one image, [frames * height * width, sum(axes_dim) / 2, 2].

    Height and width positions are centred; frames count up from `frame` (a condition layer of Layer3D RoPE: -1).
    """
    f, h, w = shape
    size = (f, h, w)
    tables = []
    for axis, positions in enumerate((range(frame, frame + f), _centred(h), _centred(w))):
        table = rotation(positions, axes_dim[axis])
        table = table.view(*(-1 if a == axis else 1 for a in range(3)), *table.shape[1:])
        tables.append(table.expand(*size, *table.shape[3:]))
    return torch.cat(tables, dim=3).flatten(0, 2)


def text_start(shapes: Sequence[ImageShape], layer3d: bool = False) -> int:
    """First text position on all three axes: behind the half-extent of the largest image (and the number of layers)."""
    start = max(max(h // 2, w // 2) for _, h, w in shapes)
    return max(start, len(shapes) - 1) if layer3d else start


def sample_rope(
    shapes: Sequence[ImageShape], text_positions: Sequence[int] | Tensor, axes_dim: Sequence[int], layer3d: bool = False
) -> tuple[Tensor, Tensor]:
    """Tables of one sample: images one after another, and its text tokens.

    Image k of the list has frame position k; with `layer3d` the last one, the condition image, has -1. Text token j
    stands at text_start + j on all three axes.

    Args:
        shapes: tokens of each image. text_positions: index of every kept text token in the padded prompt.

    Returns:
        float32 [image tokens, sum(axes_dim) / 2, 2] and [text tokens, sum(axes_dim) / 2, 2]: cos, sin.

    Raises:
        ValueError: more images or text than the models have positions for.
    """
    last = len(shapes) - 1
    start = text_start(shapes, layer3d)
    positions = as_tensor(text_positions) + start
    furthest = last
    if len(positions):  # the end of a range needs no reading of a tensor, which torch.compile could not trace
        end = start + text_positions[-1] if isinstance(text_positions, range) else int(positions.max())
        furthest = max(last, end)
    if furthest >= POSITIONS:
        raise ValueError(
            f"images and text must stay within the {POSITIONS} positions of the RoPE tables, got position {furthest}"
        )
    img = [image_rope(s, -1 if layer3d and k == last else k, axes_dim) for k, s in enumerate(shapes)]
    txt = torch.cat([rotation(positions, d) for d in axes_dim], dim=1)
    return torch.cat(img), txt


class QwenEmbedRope:
    """The table of a sample as complex numbers, called as diffusers' `transformer.pos_embed` is.

    No module: the models build their tables with their layouts (packing.py), so that no hook on it would run.
    """

    layer3d = False

    def __init__(self, axes_dim: Sequence[int]) -> None:
        self.axes_dim = list(axes_dim)

    def __call__(
        self, video_fhw: Sequence, device: torch.device | str | None = None, max_txt_seq_len: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of images and text, complex64 [tokens, sum(axes_dim) / 2] each.

        Args:
            video_fhw: (frames, height, width) of an image or of several in tokens; or a list of samples' lists, of
                which the first counts.
            max_txt_seq_len: text tokens.
        """
        if max_txt_seq_len is None:
            raise ValueError("pos_embed: max_txt_seq_len must be given, got None")
        shapes: Any = video_fhw
        while not isinstance(shapes[0], int) and not isinstance(shapes[0][0], int):
            shapes = shapes[0]
        shapes = [shapes] if isinstance(shapes[0], int) else shapes
        tables = sample_rope([tuple(s) for s in shapes], range(int(max_txt_seq_len)), self.axes_dim, self.layer3d)
        img, txt = (torch.view_as_complex(table).to(device) for table in tables)
        return img, txt


class QwenEmbedLayer3DRope(QwenEmbedRope):
    """Of the Layered model."""

    layer3d = True
