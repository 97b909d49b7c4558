"""Layouts that serve all texts of a bucket: their lengths are on the device, so that one CUDA graph replays for all."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.models.packing import Bounds, PackedLayout, cumulative

# Text rows of all samples together are filled up to a multiple of this.
BUCKET = 64


def bucket_rows(layout: PackedLayout) -> int:
    """Text rows of the bucket that a layout belongs to."""
    return -(-sum(layout.txt_lens) // BUCKET) * BUCKET


def bucketed(layout: PackedLayout) -> PackedLayout:
    """The layout with text rows filled up to `bucket_rows`.

    The rows that fill it stand behind all texts, as one more sample without an image: they attend to themselves, and
    nothing reads what becomes of them. Their rotation is zero; for modulation they belong to the last sample.
    """
    device, rows = layout.cu_txt.device, bucket_rows(layout)
    txt = sum(layout.txt_lens)

    def with_filling(lens: tuple[int, ...], more: int) -> Tensor:
        return cumulative([*lens, more], device)

    return replace(
        layout,
        txt_lens=(),
        joint_lens=(),
        cu_img=with_filling(layout.img_lens, 0),
        cu_txt=with_filling(layout.txt_lens, rows - txt),
        cu_joint=with_filling(layout.joint_lens, rows - txt),
        txt_rope=F.pad(layout.txt_rope, (0, 0, 0, 0, 0, rows - txt)),
        txt_segments=cumulative([*layout.txt_lens[:-1], rows - sum(layout.txt_lens[:-1])], device),
        bounds=Bounds(
            img=max(layout.img_lens),
            txt=rows,
            all_txt=cumulative([rows], device),
            no_txt=cumulative([0], device),
            cu_targets=None if layout.targets is None else with_filling(layout.target_lens, 0),
        ),
    )
