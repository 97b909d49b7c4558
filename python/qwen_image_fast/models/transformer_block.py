"""One double-stream block on packed tokens and fused ops.

Projections are called as modules, so that LoRA layers and hooks on them run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_image_fast.models import side_stream, stream_linear
from qwen_image_fast.models.packing import PackedLayout
from qwen_image_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from qwen_image_fast.ops.gelu_tanh import gelu_tanh
from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate
from qwen_image_fast.ops.qk_norm_rope import qk_norm_rope


class BlockVectors(NamedTuple):
    """The modulation of one stream in one block: of attention, then of the MLP. Each [conditions, width]."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Stream(NamedTuple):
    """One token stream between two sub-layers: the residual stream and its normalised, modulated copy."""

    x: Tensor
    normed: Tensor


# Rows of one stream that attention computed, in as many tensors as they lie in: [rows, heads, head_dim].
Attended = Callable[[], list[Tensor]]


def run_block(
    block: Any,
    img: Stream,
    txt: Stream,
    layout: PackedLayout,
    img_mod: BlockVectors,
    txt_mod: BlockVectors,
    next_img: tuple[Tensor, Tensor],
    next_txt: tuple[Tensor, Tensor] | None,
    img_offsets: Tensor | None,
    txt_offsets: Tensor | None,
) -> tuple[Stream, Stream]:
    """One double-stream block on normalised inputs; returns the streams normalised for what follows.

    h += gate1 * to_out(attention(LN-modulate(h))); h += gate2 * mlp(LN-modulate(h)), for both streams; each gated
    residual is one pass with the norm that follows it. `next_img`, `next_txt`: shift and scale of that next norm;
    next_txt None: this is the last block, whose text output reaches nothing and is not computed; nor is, with
    `layout.targets`, that of the other image rows.
    """
    attn = block.attn
    head_dim = attn.norm_q.weight.shape[0]
    targets = layout.targets if next_txt is None else None
    spread = getattr(attn, "spread", None)  # tensor parallel: what all ranks' heads read (training/parallel/tensor.py)
    img_x, txt_x = img.normed, txt.normed
    norms = [attn.norm_q.weight, attn.norm_k.weight, attn.norm_added_q.weight, attn.norm_added_k.weight]
    if spread is not None:
        img_x, txt_x, norms = spread(img_x), spread(txt_x), [spread(weight) for weight in norms]

    img_layers, txt_layers = [attn.to_q, attn.to_k, attn.to_v], [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
    if next_txt is None:
        txt_layers = txt_layers[1:]
        unused = unused_rows(attn.add_q_proj, txt_x)
    inputs = [img_x if targets is None else img_x[targets], img_x, img_x]
    inputs += [txt_x] * len(txt_layers)
    text_apart = spread is None and stream_linear.text_apart([*txt_layers, *text_layers(block)], txt_x)
    if text_apart:
        img_qkv, txt_qkv = side_stream.both(
            lambda: stream_linear.project(img_layers, inputs[:3]),
            lambda: stream_linear.project(txt_layers, inputs[3:]),
            img_x,
        )
        projected = [*img_qkv, *txt_qkv]
    else:
        projected = stream_linear.project([*img_layers, *txt_layers], inputs)
    img_q, img_k, img_v, *txt_q, txt_k, txt_v = (y.unflatten(-1, (-1, head_dim)) for y in projected)
    if next_txt is None and unused is not None:
        txt_k = torch.cat([txt_k, unused.unflatten(-1, (-1, head_dim))])
    norms = [weight if weight.dtype == img_q.dtype else weight.to(img_q.dtype) for weight in norms]  # autocast
    if targets is not None:  # the op wants all rows; the others are not read again
        img_q = img_q.new_zeros(len(img.x), *img_q.shape[1:]).index_copy(0, targets, img_q)
    own_txt = layout.bounds is not None and bool(txt_q)  # text queries that stay in their stream
    q, k, v = qk_norm_rope(
        img_q, img_k, img_v, txt_q[0] if txt_q and not own_txt else None, txt_k, txt_v,
        norms[0], norms[1], norms[2], norms[3],
        layout.img_rope, layout.txt_rope, layout.cu_img, layout.cu_txt, attn.norm_q.eps,
    )  # fmt: skip
    if targets is not None:
        img_y = layout.attend_targets(q[targets], k, v).flatten(1)
        img = Stream(img.x[targets], img.normed)
    elif next_txt is None:
        img_y = layout.attend(q, k, v, images_only=True).flatten(1)
    else:
        if own_txt:  # no row is copied, where lengths are on the device
            img_parts: Attended = lambda: [layout.attend(q, k, v, images_only=True)]  # noqa: E731
            txt_parts: Attended = lambda: [  # noqa: E731
                layout.attend_texts(text_queries(txt_q[0], layout, norms[2], attn.norm_q.eps), k, v)
            ]
        else:
            both_parts = layout.attend_apart(q, k, v)
            img_parts, txt_parts = (lambda: both_parts[0]), (lambda: both_parts[1])
        of_img = [attn.to_out[0]], [block.img_mlp], [img_mod], [next_img], [img_offsets]
        of_txt = [attn.to_add_out], [block.txt_mlp], [txt_mod], [next_txt], [txt_offsets]
        if text_apart:
            ended = side_stream.both(
                lambda: finish_block([img], [flat(img_parts())], *of_img),
                lambda: finish_block([txt], [flat(txt_parts())], *of_txt),
                img_x,
            )
            img, txt = ended[0][0], ended[1][0]
        else:
            of_both = [[*a, *b] for a, b in zip(of_img, of_txt)]  # type: ignore[misc]
            img, txt = finish_block([img, txt], [flat(img_parts()), flat(txt_parts())], *of_both)
        return img, txt
    (img,) = finish_block([img], [[img_y]], [attn.to_out[0]], [block.img_mlp], [img_mod], [next_img], [img_offsets])
    return img, txt


def flat(parts: list[Tensor]) -> list[Tensor]:
    """[rows, heads, head_dim] as rows."""
    return [t.flatten(1) for t in parts]


def text_queries(txt_q: Tensor, layout: PackedLayout, weight: Tensor, eps: float) -> Tensor:
    """Norm and rotation of text queries alone: as those of a stream beside one without rows."""
    assert layout.bounds is not None
    none, rope = txt_q[:0], layout.txt_rope
    return qk_norm_rope(
        txt_q, txt_q, txt_q, None, none, none, weight, weight, weight, weight,
        rope, rope[:0], layout.bounds.all_txt, layout.bounds.no_txt, eps,
    )[0]  # fmt: skip


def text_layers(block: Any) -> list[Any]:
    """Of a block, behind its attention."""
    return [block.attn.to_add_out, block.txt_mlp.net[0].proj, block.txt_mlp.net[2]]


def unused_rows(layer: Any, x: Tensor) -> Tensor | None:
    """No rows of a layer whose result reaches nothing, so that its gradients are zero, as diffusers has them.

    DistributedDataParallel waits for the gradient of every parameter. None where there is no gradient to be had.
    """
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    return layer(x[:1])[:0] if wanted else None


def finish_block(
    streams: list[Stream],
    attended: list[list[Tensor]],
    projections: list[Any],
    mlps: list[Any],
    mods: list[BlockVectors],
    following: list[tuple[Tensor, Tensor]],
    offsets: list[Tensor | None],
) -> list[Stream]:
    """The two gated residuals of each stream, each with the norm behind it, and the MLP between them.

    attended: of each stream, rows of attention in as many tensors as they lie in.
    """
    residual = [s.x for s in streams]
    x, normed = gated_norm(
        residual, projections, attended, [m.gate1 for m in mods], [(m.shift2, m.scale2) for m in mods], offsets
    )
    expand, reduce = [mlp.net[0].proj for mlp in mlps], [mlp.net[2] for mlp in mlps]
    in_8_bits = stream_linear.in_8_bits([*expand, *reduce], [*normed, *x, *(m.gate2 for m in mods)])
    if in_8_bits:  # GELU is part of what rounds its result
        hidden = stream_linear.each(expand, normed)
    elif stream_linear.in_one_launch("linear_gelu", expand, normed):
        hidden = stream_linear.gelu(expand, normed)
    else:
        hidden = [gelu_tanh(t, inplace=True) for t in stream_linear.each(expand, normed)]
    parts = [[t] for t in hidden]
    return list(map(Stream, *gated_norm(x, reduce, parts, [m.gate2 for m in mods], following, offsets, in_8_bits)))


def gated_norm(
    residual: list[Tensor],
    layers: list[Any],
    parts: list[list[Tensor]],
    gate: list[Tensor],
    following: list[tuple[Tensor, Tensor]],
    offsets: list[Tensor | None],
    gelu: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """x = residual + gate * layer(y) and LN-modulate(x) of each stream, y the rows of its parts; `following`: its shift
    and scale.

    gelu: the layers are in 8 bits and take gelu_tanh(y).
    """
    apart = stream_linear.multiplied_apart(layers, parts)
    y = [] if apart else list(map(stream_linear.joined, parts))
    if stream_linear.in_8_bits(layers, [*residual, *y, *gate]):
        x = stream_linear.int8_gate_residual(layers, residual, y, gate, offsets, gelu)
        return x, [layer_norm_modulate(t, f[0], f[1], o) for t, f, o in zip(x, following, offsets)]
    if not apart and stream_linear.in_one_launch("linear_gate_residual", layers, y):
        x = stream_linear.gate_residual(layers, residual, y, gate, offsets)
        return x, [layer_norm_modulate(t, f[0], f[1], o) for t, f, o in zip(x, following, offsets)]
    products = list(map(stream_linear.of_parts, layers, parts)) if apart else stream_linear.each(layers, y)
    pairs = [
        gate_residual_norm_modulate(r, t, g, f[0], f[1], o)
        for r, t, g, f, o in zip(residual, products, gate, following, offsets)
    ]
    return [x for x, _ in pairs], [normed for _, normed in pairs]
