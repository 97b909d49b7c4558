"""The transformer with every module called, as diffusers' forward calls them.

The packed forward (`transformer_forward.py`) reads the weights of norms, of modulation and of the gates around them and
does not call their modules, which is what its fused ops are made of. Whatever is put on one of those modules, or takes
the place of attention or of a whole block (hooks, attention processors, step caches, weights that hooks bring), needs
this form: the same mathematics in more passes. A block gets and returns hidden states instead of `Stream`s, of all
samples in one sequence: [1, rows, width].
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.packing import PackedLayout
from qwen_image_fast.models.transformer_block import BlockVectors
from qwen_image_fast.once import warn_once
from qwen_image_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate

logger = logging.getLogger(__name__)

# Conditions of the image stream and of the text stream: [conditions, width] each, or the vectors made of them.
Conditions = tuple[Tensor, Tensor]


class QwenDoubleStreamAttnProcessor2_0:
    """Attention over [text, image] of every sample: what `JointAttention` computes if it is called.

    It has diffusers' name, as the one that a model has until another is set.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        layout: PackedLayout,
    ) -> tuple[Tensor, Tensor]:
        """The streams, [1, rows, width], behind their output projections."""
        streams = []
        for x, names, norms, rope in (
            (encoder_hidden_states, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"),
             layout.txt_rope),
            (hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), layout.img_rope),
        ):  # fmt: skip
            q, k, v = (getattr(attn, name)(x).flatten(0, 1).unflatten(-1, (attn.heads, -1)) for name in names)
            q, k = (rotated(getattr(attn, norm)(t), rope) for norm, t in zip(norms, (q, k)))
            streams.append((q, k, v))
        txt, img = streams
        q, k, v = (_joint(a, b, layout) for a, b in zip(txt, img))
        parts = (
            layout.attend(q, k, v).flatten(1).split([n for pair in zip(layout.txt_lens, layout.img_lens) for n in pair])
        )
        img_y, txt_y = torch.cat(parts[1::2])[None], torch.cat(parts[0::2])[None]
        for layer in attn.to_out:
            img_y = layer(img_y)
        return img_y, attn.to_add_out(txt_y)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Interleaved RoPE of x, [rows, heads, head_dim], by the table [rows, head_dim / 2, 2], in float32 or better."""
    cos, sin = rope[:, None].unbind(-1)
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def _joint(txt: Tensor, img: Tensor, layout: PackedLayout) -> Tensor:
    """Rows of [text, image] of every sample, one sample after another."""
    pairs = zip(txt.split(list(layout.txt_lens)), img.split(list(layout.img_lens)))
    return torch.cat([rows for pair in pairs for rows in pair])


def attend_by(
    processor: Any, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """A user's own attention processor, called as diffusers calls it, for one sample at a time: no token is padded, but
    where `layout.keep` says which count. It is given what its signature names."""
    known = inspect.signature(processor.__call__).parameters
    if left := [name for name in ("encoder_hidden_states_mask", "image_rotary_emb") if name not in known]:
        warn_once(logger, attn, "%s is not given %s, which it does not name", type(processor).__name__, ", ".join(left))
    images, texts = list(layout.img_lens), list(layout.txt_lens)
    found = []
    for i, (img, txt, img_rope, txt_rope) in enumerate(
        zip(
            hidden_states.split(images, dim=1),
            encoder_hidden_states.split(texts, dim=1),
            layout.img_rope.split(images),
            layout.txt_rope.split(texts),
        )
    ):
        given: dict[str, Any] = {}
        if "encoder_hidden_states_mask" in known:
            given["encoder_hidden_states_mask"] = None if layout.keep is None else layout.keep[i, 0, :, : txt.shape[1]]
        if "image_rotary_emb" in known:
            given["image_rotary_emb"] = tuple(torch.view_as_complex(t.contiguous()) for t in (img_rope, txt_rope))
        found.append(processor(attn, img, encoder_hidden_states=txt, attention_mask=None, **given))
    img_y, txt_y = zip(*found)
    return torch.cat(img_y, dim=1), torch.cat(txt_y, dim=1)


def _offsets(conditions: Tensor, rows: Tensor) -> Tensor | None:
    """First row of each segment that has a condition of its own; None: all have one."""
    return None if len(conditions) == 1 else rows


def _vectors(modulate: Any, conditions: Tensor, width: int) -> BlockVectors:
    """Of a stream of a block; conditions of 6 * width are the vectors already."""
    made = conditions if conditions.shape[-1] == 6 * width else modulate(conditions)
    return BlockVectors(*made.split(width, dim=-1))


def called_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Conditions, layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """A block of hidden states [1, rows, width]. Returns, as diffusers' does, encoder_hidden_states, hidden_states."""
    img, txt = hidden_states.flatten(0, 1), encoder_hidden_states.flatten(0, 1)
    width = img.shape[-1]
    streams = []
    for x, modulate, conditions, segments in (
        (img, block.img_mod, temb[0], layout.segments), (txt, block.txt_mod, temb[1], layout.text_segments),
    ):  # fmt: skip
        mod, offsets = _vectors(modulate, conditions, width), _offsets(conditions, segments)
        streams.append((x, mod, offsets, layer_norm_modulate(x, mod.shift1, mod.scale1, offsets)))
    attended = block.attn(hidden_states=streams[0][3][None], encoder_hidden_states=streams[1][3][None], layout=layout)
    ended = []
    for (x, mod, offsets, _), y, mlp in zip(streams, attended, (block.img_mlp, block.txt_mlp)):
        y = y.flatten(0, 1).to(x.dtype)
        x, normed = gate_residual_norm_modulate(x, y, mod.gate1, mod.shift2, mod.scale2, offsets)
        y = mlp(normed[None]).flatten(0, 1).to(x.dtype)
        # The norm behind it belongs to the next block, which a hook may change.
        x, _ = gate_residual_norm_modulate(x, y, mod.gate2, mod.shift2, mod.scale2, offsets)
        ended.append(x[None])
    return ended[1], ended[0]


def called_forward(
    model: Any,
    img: Tensor,
    txt: Tensor,
    layout: PackedLayout,
    modulation: Modulation,
    controlnet_block_samples: Sequence[Tensor] | None = None,
) -> Tensor:
    """`forward_packed` with every module called.

    ValueError: processes compute it together, which share rows or heads that attention has to see.
    """
    blocks = model.transformer_blocks
    if model.ranks is not None or any(hasattr(block.attn, "spread") for block in blocks):
        raise ValueError(
            "QwenImageTransformer2DModel: several processes cannot compute it together with hooks, a step cache or "
            "attention processors on its modules; take them off, or disable_parallel"
        )
    hidden_states, encoder_hidden_states = model.img_in(img)[None], txt[None]
    for i, block in enumerate(blocks):
        args = hidden_states, encoder_hidden_states, modulation.of_block(i), layout
        if model.gradient_checkpointing and torch.is_grad_enabled():
            encoder_hidden_states, hidden_states = checkpoint(block, *args, use_reentrant=False)
        else:
            names = ("hidden_states", "encoder_hidden_states", "temb", "layout")
            with model.unit("blocks", i):
                encoder_hidden_states, hidden_states = block(**dict(zip(names, args)))
        if controlnet_block_samples is not None:
            interval = math.ceil(len(blocks) / len(controlnet_block_samples))
            hidden_states = hidden_states + controlnet_block_samples[i // interval]
    rows, conditions = hidden_states.flatten(0, 1), modulation.final
    segments: Any = layout.segments
    if layout.targets is not None:
        rows = rows[layout.targets]
        if len(conditions) > 1:  # one for each sample, whose other rows are gone
            conditions = conditions[:: len(conditions) // layout.samples]
            segments = layout.cu_targets
    return model.proj_out(model.norm_out(rows, conditions, _offsets(conditions, segments)))


def called_modulation(model: Any, temb: Tensor) -> Modulation:
    """The conditions themselves, of which every block makes its vectors, as its weights may be there only then.

    Of a model whose weights are streamed, blocks get them ready made: `model.unit` brings weights of modulation apart.
    """
    if model.streamed is None:
        return Modulation([temb], [temb], temb)
    img, txt = [], []
    for i, block in enumerate(model.transformer_blocks):
        with model.unit("modulation", i):
            img.append(block.img_mod(temb))
            txt.append(block.txt_mod(temb))
    return Modulation(img, txt, temb)


def finished(model: Any, modulation: Modulation) -> Modulation:
    """Vectors for the fused ops, of conditions that were computed while modules were called."""
    img, txt, final = modulation
    width = model.inner_dim
    if final.shape[-1] != width:
        return modulation
    if img[0].shape[-1] == width:
        img_temb, txt_temb = F.silu(img[0]), F.silu(txt[0])
        img = [block.img_mod[1](img_temb) for block in model.transformer_blocks]
        txt = [block.txt_mod[1](txt_temb) for block in model.transformer_blocks]
    return Modulation(img, txt, model.norm_out.linear(F.silu(final)))
