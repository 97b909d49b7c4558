"""What the Qwen-Image transformer computes, on packed tokens and fused ops.

`TransformerForward` works on the module tree of `transformer.py`, which has diffusers' names: the drop-in mixes the
same class into diffusers' model. Projections are called as modules, so that LoRA layers and hooks on them run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen_image_fast.models import stream_linear
from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.outputs import Output
from qwen_image_fast.models.packing import PackedLayout, pack_padded
from qwen_image_fast.ops import keeping_choices
from qwen_image_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from qwen_image_fast.ops.gelu_tanh import gelu_tanh
from qwen_image_fast.ops.joint_attention import joint_attention
from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate
from qwen_image_fast.ops.qk_norm_rope import qk_norm_rope

logger = logging.getLogger(__name__)


@dataclass
class Transformer2DModelOutput(Output):
    sample: Tensor


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


class TransformerForward:
    """`forward` with diffusers' signature, and `forward_packed` on a `PackedLayout`."""

    # What the model has that this class is mixed into.
    config: Any
    time_text_embed: Any
    txt_norm: Any
    img_in: Any
    txt_in: Any
    transformer_blocks: Any
    norm_out: Any
    proj_out: Any
    gradient_checkpointing: bool
    # Weights of units that are read when they are used (models/streaming.py); None: all are in memory.
    streamed: Any = None

    def unit(self, track: str, i: int) -> AbstractContextManager:
        """Around what uses the weights of a block: "blocks", or "modulation"."""
        return nullcontext() if self.streamed is None else self.streamed.unit(track, i)

    # ---- modulation ---------------------------------------------------------------------------------------------

    def modulation(self, timestep: Tensor, additional_t_cond: Tensor | None = None) -> Modulation:
        """The vectors of every block at the noise levels `timestep`, [conditions] in [0, 1], in the model's dtype."""
        like = timestep.new_empty(0, dtype=self.proj_out.weight.dtype)
        temb = F.silu(self.time_text_embed(timestep.to(like.dtype), like, additional_t_cond))
        return self.block_modulation(temb)

    def block_modulation(self, temb: Tensor) -> Modulation:
        """The vectors of silu(temb)."""
        img, txt = [], []
        for i, block in enumerate(self.transformer_blocks):
            with self.unit("modulation", i):
                img.append(block.img_mod[1](temb))
                txt.append(block.txt_mod[1](temb))
        return Modulation(img, txt, self.norm_out.linear(temb))

    def sample_modulation(self, timestep: Tensor, additional_t_cond: Tensor | None = None) -> Modulation:
        """The vectors of a batch, [samples] noise levels; with `zero_cond_t` also those of its reference images."""
        if not self.config.zero_cond_t:
            return self.modulation(timestep, additional_t_cond)
        if additional_t_cond is not None:
            additional_t_cond = torch.cat([additional_t_cond, additional_t_cond])
        both = self.modulation(torch.cat([timestep, timestep * 0]), additional_t_cond)
        n = timestep.shape[0]
        return both.select(slice(0, n)).with_references(both.select(slice(n, 2 * n)))

    # ---- the packed model ---------------------------------------------------------------------------------------

    def embed_text(self, txt: Tensor) -> Tensor:
        """Condition encoder states [text rows, joint_attention_dim] -> [text rows, width]; the same at every step."""
        return self.txt_in(self.txt_norm(txt))

    def forward_packed(
        self,
        img: Tensor,
        txt: Tensor,
        layout: PackedLayout,
        modulation: Modulation,
        controlnet_block_samples: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The velocity of every image token.

        Args:
            img: [image rows, in_channels] packed latent tokens. txt: [text rows, width], from `embed_text`.
            layout: where the rows belong. modulation: one condition for all samples, or one per segment of `layout`.
            controlnet_block_samples: residuals [image rows, width], spread over the blocks.

        Returns:
            [image rows, patch_size^2 * out_channels]; with `layout.targets` only those rows, and of the others the last
            block computes keys and values alone.
        """
        blocks = self.transformer_blocks
        img = self.img_in(img)
        width = img.shape[-1]
        img_offsets = None if modulation.img[0].shape[0] == 1 else layout.segments
        txt_offsets = None if modulation.txt[0].shape[0] == 1 else layout.cu_txt
        img_mods = [BlockVectors(*m.split(width, dim=1)) for m in modulation.img]
        txt_mods = [BlockVectors(*m.split(width, dim=1)) for m in modulation.txt]
        final_scale, final_shift = modulation.final.split(width, dim=1)

        img_s = Stream(img, layer_norm_modulate(img, img_mods[0].shift1, img_mods[0].scale1, img_offsets))
        txt_s = Stream(txt, layer_norm_modulate(txt, txt_mods[0].shift1, txt_mods[0].scale1, txt_offsets))
        for i, block in enumerate(blocks):
            last = i == len(blocks) - 1
            if last and layout.targets is not None and img_offsets is not None:
                # From here on the rows are those of the targets: one condition per sample.
                per_sample = slice(None, None, len(final_shift) // layout.samples)
                img_offsets = layout.cu_targets
                img_mods[i] = BlockVectors(*(m[per_sample] for m in img_mods[i]))
                final_shift, final_scale = final_shift[per_sample], final_scale[per_sample]
            next_img = (final_shift, final_scale) if last else (img_mods[i + 1].shift1, img_mods[i + 1].scale1)
            next_txt = None if last else (txt_mods[i + 1].shift1, txt_mods[i + 1].scale1)
            args = (block, img_s, txt_s, layout, img_mods[i], txt_mods[i], next_img, next_txt, img_offsets, txt_offsets)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                img_s, txt_s = checkpoint(keeping_choices(self.run_block), *args, use_reentrant=False)
            else:
                with self.unit("blocks", i):
                    img_s, txt_s = self.run_block(*args)
            if controlnet_block_samples is not None:
                interval = math.ceil(len(blocks) / len(controlnet_block_samples))
                added = controlnet_block_samples[i // interval]
                x = img_s.x + (added[layout.targets] if last and layout.targets is not None else added)
                img_s = Stream(x, layer_norm_modulate(x, next_img[0], next_img[1], img_offsets))
        return self.proj_out(img_s.normed)

    def run_block(self, block: Any, *args: Any) -> tuple[Stream, Stream]:
        """`run_block`; a model whose blocks have it as their forward calls those, so that hooks on a block run."""
        return run_block(block, *args)

    # ---- diffusers' signature -----------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """diffusers' call: padded batches [samples, tokens, channels], any text mask, sizes that may differ.

        Args:
            hidden_states: [B, L, in_channels]. encoder_hidden_states: [B, T, joint_attention_dim]. Both become the
                type of the weights.
            encoder_hidden_states_mask: [B, T], nonzero where a text token counts; None: everywhere.
            timestep: [B] noise levels in [0, 1].
            img_shapes: per sample a list of (frames, height, width) in tokens, the generated image first; a sample
                with fewer than L tokens is padded at the end.
            guidance: must be None. attention_kwargs: `scale` is handled by the drop-in; the rest has no use here.
            controlnet_block_samples: residuals [B, L, width]. additional_t_cond: [B] int, Layered model.

        Returns:
            `.sample` or a tuple: [B, L, patch_size^2 * out_channels], zero at padding.
        """
        samples, rows = self._check_inputs(hidden_states, encoder_hidden_states, timestep, img_shapes, guidance)
        assert encoder_hidden_states is not None and timestep is not None  # checked, with a sentence
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states, encoder_hidden_states = self._typed(hidden_states, encoder_hidden_states)
        layout = self.layout_of(img_shapes, rows, encoder_hidden_states_mask, encoder_hidden_states)
        img, txt = hidden_states.flatten(0, 1), encoder_hidden_states.flatten(0, 1)
        if layout.txt_index is not None:
            txt = txt[layout.txt_index]
        if controlnet_block_samples is not None:
            controlnet_block_samples = [c.expand(samples, -1, -1).flatten(0, 1) for c in controlnet_block_samples]
        if layout.img_index is not None:
            img = img[layout.img_index]
            if controlnet_block_samples is not None:
                controlnet_block_samples = [c[layout.img_index] for c in controlnet_block_samples]
        modulation = self.modulation_of(timestep.expand(samples), additional_t_cond)
        out = self.forward_packed(img, self.embed_text(txt), layout, modulation, controlnet_block_samples)
        if layout.targets is not None:
            out = out.new_zeros(len(img), out.shape[-1]).index_copy(0, layout.targets, out)
        if layout.img_index is not None:
            padded = out.new_zeros(samples * rows, out.shape[-1])
            out = padded.index_copy(0, layout.img_index, out)
        out = out.unflatten(0, (samples, rows))
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _typed(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """In the type of the weights."""
        dtype = self.img_in.weight.dtype
        return hidden_states.to(dtype), encoder_hidden_states.to(dtype)

    def modulation_of(self, timestep: Tensor, additional_t_cond: Tensor | None) -> Modulation:
        """Where `forward` gets its modulation vectors; the drop-in answers from its tables."""
        return self.sample_modulation(timestep, additional_t_cond)

    def target_images(self, img_shapes) -> int | None:
        """How many images of each sample the caller reads of the result; None: all. The drop-in knows its pipelines."""
        return None

    def layout_of(self, img_shapes, img_rows: int, mask: Tensor | None, txt: Tensor) -> PackedLayout:
        """The layout of a padded batch, kept for the next step of the same loop.

        A mask is recognised by identity, so that no device value is read again; the cache holds it, so its id stays
        its own.
        """
        samples, txt_rows = txt.shape[:2]
        targets = self.target_images(img_shapes)

        def make() -> PackedLayout:
            config = self.config
            return pack_padded(
                img_shapes, img_rows, mask, txt_rows, samples, axes_dim=config.axes_dims_rope,
                layer3d=config.use_layer3d_rope, zero_cond_t=config.zero_cond_t, targets=targets,
                device=txt.device,
            )  # fmt: skip

        if torch.compiler.is_compiling():
            return make()
        version = None if mask is None or mask.is_inference() else mask._version
        known = None if mask is None else id(mask)
        key = (str(img_shapes), targets, samples, img_rows, txt_rows, txt.device, known, version)
        cache = self.__dict__.setdefault("_layouts", {})
        if key not in cache:
            while len(cache) >= 8:
                cache.pop(next(iter(cache)))
            cache[key] = (make(), mask)
        return cache[key][0]

    def _check_inputs(self, hidden_states, encoder_hidden_states, timestep, img_shapes, guidance) -> tuple[int, int]:
        config = self.config
        if guidance is not None:
            raise ValueError("guidance must be None: no Qwen-Image transformer has a guidance embedding")
        for name, t in (("encoder_hidden_states", encoder_hidden_states), ("timestep", timestep)):
            if t is None:
                raise ValueError(f"{name} must be given, got None")
        if img_shapes is None or len(img_shapes) == 0:
            raise ValueError("img_shapes must name the (frames, height, width) of each sample's images, got none")
        for name, t, channels in (
            ("hidden_states", hidden_states, config.in_channels),
            ("encoder_hidden_states", encoder_hidden_states, config.joint_attention_dim),
        ):
            if t.dim() != 3 or t.shape[-1] != channels:
                raise ValueError(f"{name} must have the shape [batch, tokens, {channels}], got {tuple(t.shape)}")
            if not t.is_floating_point():
                raise TypeError(f"{name} must have a floating-point dtype, got {t.dtype}")
        if hidden_states.shape[0] != encoder_hidden_states.shape[0]:
            raise ValueError(
                f"hidden_states and encoder_hidden_states must have one batch size, "
                f"got {hidden_states.shape[0]} and {encoder_hidden_states.shape[0]}"
            )
        return hidden_states.shape[0], hidden_states.shape[1]


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
    inputs = [img_x if targets is None else img_x[targets], img_x, img_x]
    inputs += [txt_x] * len(txt_layers)
    img_q, img_k, img_v, *txt_q, txt_k, txt_v = (
        y.unflatten(-1, (-1, head_dim)) for y in stream_linear.project([*img_layers, *txt_layers], inputs)
    )
    if targets is not None:  # the op wants all rows; the others are not read again
        img_q = img_q.new_zeros(len(img.x), *img_q.shape[1:]).index_copy(0, targets, img_q)
    q, k, v = qk_norm_rope(
        img_q, img_k, img_v, txt_q[0] if txt_q else None, txt_k, txt_v,
        norms[0], norms[1], norms[2], norms[3],
        layout.img_rope, layout.txt_rope, layout.cu_img, layout.cu_txt, attn.norm_q.eps,
    )  # fmt: skip
    if targets is not None:
        img_y = joint_attention(
            q[targets], k, v, layout.target_lens, layout.joint_lens, layout.cu_targets, layout.cu_joint
        ).flatten(1)
        img = Stream(img.x[targets], img.normed)
    elif next_txt is None:
        img_y = layout.attend(q, k, v, images_only=True).flatten(1)
    else:
        img_y, txt_y = layout.split_joint(layout.attend(q, k, v).flatten(1))
        img, txt = finish_block(
            [img, txt], [img_y, txt_y], [attn.to_out[0], attn.to_add_out], [block.img_mlp, block.txt_mlp],
            [img_mod, txt_mod], [next_img, next_txt], [img_offsets, txt_offsets],
        )  # fmt: skip
        return img, txt
    (img,) = finish_block([img], [img_y], [attn.to_out[0]], [block.img_mlp], [img_mod], [next_img], [img_offsets])
    return img, txt


def finish_block(
    streams: list[Stream],
    attended: list[Tensor],
    projections: list[Any],
    mlps: list[Any],
    mods: list[BlockVectors],
    following: list[tuple[Tensor, Tensor]],
    offsets: list[Tensor | None],
) -> list[Stream]:
    """The two gated residuals of each stream, each with the norm behind it, and the MLP between them."""
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
    return list(map(Stream, *gated_norm(x, reduce, hidden, [m.gate2 for m in mods], following, offsets, in_8_bits)))


def gated_norm(
    residual: list[Tensor],
    layers: list[Any],
    y: list[Tensor],
    gate: list[Tensor],
    following: list[tuple[Tensor, Tensor]],
    offsets: list[Tensor | None],
    gelu: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """x = residual + gate * layer(y) and LN-modulate(x) of each stream; `following`: its shift and scale.

    gelu: the layers are in 8 bits and take gelu_tanh(y).
    """
    if stream_linear.in_8_bits(layers, [*residual, *y, *gate]):
        x = stream_linear.int8_gate_residual(layers, residual, y, gate, offsets, gelu)
        return x, [layer_norm_modulate(t, f[0], f[1], o) for t, f, o in zip(x, following, offsets)]
    if stream_linear.in_one_launch("linear_gate_residual", layers, y):
        x = stream_linear.gate_residual(layers, residual, y, gate, offsets)
        return x, [layer_norm_modulate(t, f[0], f[1], o) for t, f, o in zip(x, following, offsets)]
    pairs = [
        gate_residual_norm_modulate(r, t, g, f[0], f[1], o)
        for r, t, g, f, o in zip(residual, stream_linear.each(layers, y), gate, following, offsets)
    ]
    return [x for x, _ in pairs], [normed for _, normed in pairs]
