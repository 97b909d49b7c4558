"""Where every token of a packed batch belongs: samples one after another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.models.rope import ImageShape, sample_rope
from qwen_image_fast.ops.joint_attention import bounded_attention, joint_attention, joint_attention_parts


class Bounds(NamedTuple):
    """Of a layout whose lengths of text are on the device alone (models/buckets.py).

    img, txt: rows of the longest image and of all texts. all_txt, no_txt: int32 [0, txt] and [0, 0], all text rows as
    those of one sample, and none. cu_targets: as in the layout, and one more, the last again.
    """

    img: int
    txt: int
    all_txt: Tensor
    no_txt: Tensor
    cu_targets: Tensor | None


@dataclass(frozen=True)
class PackedLayout:
    """The tokens of a batch: image rows and text rows of all samples, each stream packed on its own.

    Attributes:
        shapes: per sample, the token shapes of its images, the generated one first.
        img_lens, txt_lens, joint_lens: tokens of each sample, of its images, of its text, of both.
        cu_img, cu_txt, cu_joint: int32 [samples + 1], first row of each sample in its stream, and among both.
        img_rope, txt_rope: float32 [rows, head_dim / 2, 2] (models/rope.py).
        segments: int32, first image row of each modulation segment: one per sample, or with `zero_cond_t` two (the
            generated image, its references).
        img_index, txt_index: rows of the padded batch that are kept; None: all of them.
        target_lens: tokens of each sample's generated images.
        targets: int64, their rows where only those are wanted of the output; None: all rows.
        cu_targets: int32 [samples + 1], first row of each sample among the targets.
        keep: bool [samples, 1, 1, joint rows of a sample], the keys that count where padding is kept; None: all.
        txt_segments: int32, first text row of each modulation segment; None: `cu_txt`.
        bounds: of lengths that only the device knows; None: txt_lens and joint_lens tell them.
    """

    shapes: tuple[tuple[ImageShape, ...], ...]
    img_lens: tuple[int, ...]
    txt_lens: tuple[int, ...]
    joint_lens: tuple[int, ...]
    cu_img: Tensor
    cu_txt: Tensor
    cu_joint: Tensor
    img_rope: Tensor
    txt_rope: Tensor
    segments: Tensor
    target_lens: tuple[int, ...]
    img_index: Tensor | None = None
    txt_index: Tensor | None = None
    targets: Tensor | None = None
    cu_targets: Tensor | None = None
    keep: Tensor | None = None
    txt_segments: Tensor | None = None
    bounds: Bounds | None = None

    @property
    def text_segments(self) -> Tensor:
        return self.cu_txt if self.txt_segments is None else self.txt_segments

    @property
    def samples(self) -> int:
        return len(self.shapes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, images_only: bool = False) -> Tensor:
        """Attention of the joint rows, or of the image rows alone, to the joint rows of their samples.

        A layout of which other processes hold a part asks them (parallel/ulysses.py).
        """
        if self.keep is not None:
            q, k, v = (t.unflatten(0, (self.samples, -1)).transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep).transpose(1, 2).flatten(0, 1)
        if images_only:
            if self.bounds is not None:
                return self._attend_bounded(q, k, v, self.cu_img, self.bounds.img)
            return joint_attention(q, k, v, self.img_lens, self.joint_lens, self.cu_img, self.cu_joint)
        return joint_attention(q, k, v, self.joint_lens, None, self.cu_joint, self.cu_joint)

    def attend_apart(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Attention of the joint rows: the image rows and the text rows of each sample, [rows, heads, head_dim], as
        the kernels left them."""
        if self.keep is None:
            parts = joint_attention_parts(q, k, v, self.joint_lens, None, self.cu_joint, self.cu_joint)
        else:
            parts = [self.attend(q, k, v)]
        lens = [n for pair in zip(self.txt_lens, self.img_lens) for n in pair]
        if len(parts) == 1:
            pieces = parts[0].split(lens)
        else:
            pieces = tuple(piece for i, part in enumerate(parts) for piece in part.split(lens[2 * i : 2 * i + 2]))
        return list(pieces[1::2]), list(pieces[0::2])

    def attend_targets(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the targets' rows to the joint rows of their samples."""
        if self.bounds is not None and self.bounds.cu_targets is not None:
            return self._attend_bounded(q, k, v, self.bounds.cu_targets, max(self.target_lens))
        return joint_attention(q, k, v, self.target_lens, self.joint_lens, self.cu_targets, self.cu_joint)

    def attend_texts(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the text rows to the joint rows of their samples, with `bounds`."""
        assert self.bounds is not None
        return self._attend_bounded(q, k, v, self.cu_txt, self.bounds.txt)

    def _attend_bounded(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, most: int) -> Tensor:
        assert self.bounds is not None
        return bounded_attention(q, k, v, cu_q, self.cu_joint, most, self.bounds.img + self.bounds.txt)


class KnownLayout(NamedTuple):
    """A layout, and the mask it was made of: as it was then, where it can be read for nothing, or its version."""

    layout: PackedLayout
    mask: Tensor | None
    values: Tensor | None
    version: int | None

    @classmethod
    def of(cls, layout: PackedLayout, mask: Tensor | None) -> KnownLayout:
        if mask is None:
            return cls(layout, None, None, None)
        if mask.is_cpu or mask.is_inference():  # which has no version
            return cls(layout, mask, mask.clone(), None)
        return cls(layout, mask, None, mask._version)

    def holds(self) -> bool:
        """Whether the mask is what it was."""
        if self.mask is None:
            return True
        return self.mask._version == self.version if self.values is None else torch.equal(self.mask, self.values)


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 [0, l0, l0 + l1, ...]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def normalize_shapes(img_shapes: Sequence, samples: int) -> tuple[tuple[ImageShape, ...], ...]:
    """diffusers' `img_shapes` (per sample a list of (frames, height, width), or one tuple) for `samples` samples."""
    per_sample: list[Any] = []
    for entry in img_shapes:
        first: Any = entry[0]  # a number of Python's, numpy's or a tensor's, or an image's shape
        number = isinstance(first, int) or not (isinstance(first, Sequence) or getattr(first, "ndim", False))
        images = [entry] if number else entry
        per_sample.append(tuple(tuple(int(n) for n in image) for image in images))
    if len(per_sample) != samples:
        if len(set(per_sample)) != 1:
            raise ValueError(
                f"img_shapes must have one entry per sample, {samples}, got {len(per_sample)} different ones"
            )
        per_sample = per_sample[:1] * samples
    return tuple(per_sample)


def pack(
    shapes: tuple[tuple[ImageShape, ...], ...],
    txt_lens: Sequence[int],
    *,
    axes_dim: Sequence[int],
    layer3d: bool = False,
    zero_cond_t: bool = False,
    txt_positions: Sequence[Tensor] | None = None,
    img_index: Tensor | None = None,
    txt_index: Tensor | None = None,
    targets: Sequence[int] | None = None,
    keep: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> PackedLayout:
    """Build the layout of a batch.

    Args:
        shapes: per sample, (frames, height, width) in tokens of its images.
        txt_lens: kept text tokens of each sample. txt_positions: their indices in the prompt; None: 0, 1, 2, ...
        axes_dim, layer3d, zero_cond_t: the model's configuration.
        targets: how many images of each sample, from the first one, are generated: the model returns their rows alone.
            None: one, and the model returns all rows.
        keep: as in the layout.
    """
    tables = [
        sample_rope(s, range(n) if txt_positions is None else txt_positions[b], axes_dim, layer3d)
        for b, (s, n) in enumerate(zip(shapes, txt_lens))
    ]
    img_lens = [sum(f * h * w for f, h, w in sample) for sample in shapes]
    joint_lens = [i + t for i, t in zip(img_lens, txt_lens)]
    counts = [1] * len(shapes) if targets is None else targets
    target_lens = [sum(f * h * w for f, h, w in sample[:count]) for sample, count in zip(shapes, counts)]
    rows = None
    if targets is not None and target_lens != img_lens:
        starts = accumulate(img_lens[:-1], initial=0)
        rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, target_lens)]).to(device)
    if zero_cond_t:
        segments = cumulative([n for t, length in zip(target_lens, img_lens) for n in (t, length - t)], device)
    else:
        segments = cumulative(img_lens, device)
    return PackedLayout(
        shapes=shapes,
        img_lens=tuple(img_lens),
        txt_lens=tuple(txt_lens),
        joint_lens=tuple(joint_lens),
        cu_img=cumulative(img_lens, device),
        cu_txt=cumulative(txt_lens, device),
        cu_joint=cumulative(joint_lens, device),
        img_rope=torch.cat([t[0] for t in tables]).to(device),
        txt_rope=torch.cat([t[1] for t in tables]).to(device),
        segments=segments,
        img_index=img_index,
        txt_index=txt_index,
        target_lens=tuple(target_lens),
        targets=rows,
        cu_targets=None if rows is None else cumulative(target_lens, device),
        keep=keep,
    )


def pack_padded(
    img_shapes: Sequence,
    img_rows: int,
    text_mask: Tensor | None,
    txt_rows: int,
    samples: int,
    *,
    axes_dim: Sequence[int],
    layer3d: bool = False,
    zero_cond_t: bool = False,
    targets: int | None = None,
    keep_padding: bool = False,
    device: torch.device | str = "cpu",
) -> PackedLayout:
    """The layout of a padded batch [samples, img_rows, ...], [samples, txt_rows, ...] with any text mask.

    Masked text tokens are dropped; the kept ones keep the position they had. A sample whose images have fewer tokens
    than `img_rows` is padded at the end. `targets`: as in `pack`, one number for all samples. With `keep_padding`, for
    torch.compile, where no value of a tensor is known, masked tokens beside pictures of one size are computed and seen
    by none.
    """
    shapes = normalize_shapes(img_shapes, samples)
    img_lens = [sum(f * h * w for f, h, w in sample) for sample in shapes]
    for b, n in enumerate(img_lens):
        if n > img_rows or (len(set(img_lens)) == 1 and n != img_rows):
            raise ValueError(
                f"hidden_states must hold the {n} image tokens that img_shapes names for sample {b}, got {img_rows}"
            )
    img_index = txt_index = positions = seen = None
    if any(n != img_rows for n in img_lens):
        img_index = torch.cat([torch.arange(n) + b * img_rows for b, n in enumerate(img_lens)]).to(device)
    txt_lens = [txt_rows] * samples
    if text_mask is not None:
        if tuple(text_mask.shape) != (samples, txt_rows):
            raise ValueError(
                f"encoder_hidden_states_mask must have the shape {(samples, txt_rows)} of the text, "
                f"got {tuple(text_mask.shape)}"
            )
        keep = text_mask.bool()
        if keep_padding and img_index is None and targets is None:
            seen = torch.cat([keep, keep.new_ones(samples, img_rows)], dim=1)[:, None, None]
        elif not bool(keep.all()):
            txt_index = keep.flatten().nonzero().flatten()
            positions = [row.nonzero().flatten() for row in keep.cpu()]
            txt_lens = [len(p) for p in positions]
    return pack(
        shapes, txt_lens, axes_dim=axes_dim, layer3d=layer3d, zero_cond_t=zero_cond_t, txt_positions=positions,
        img_index=img_index, txt_index=txt_index, targets=None if targets is None else [targets] * samples,
        keep=seen, device=device,
    )  # fmt: skip
