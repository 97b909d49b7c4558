"""What the Qwen-Image transformer computes, on packed tokens and fused ops.

`TransformerForward` works on the module tree of `transformer.py`, which has diffusers' names: the drop-in mixes the
same class into diffusers' model. Projections are called as modules, so that LoRA layers and hooks on them run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen_image_fast.models.hooks import some_weight
from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.outputs import Output
from qwen_image_fast.models.packing import KnownLayout, PackedLayout, normalize_shapes, pack_padded
from qwen_image_fast.models.transformer_block import BlockVectors, Stream, run_block
from qwen_image_fast.ops import keeping_choices
from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate

logger = logging.getLogger(__name__)


@dataclass
class Transformer2DModelOutput(Output):
    sample: Tensor


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
    # The processes that compute a forward together (parallel/ranks.py); None: this one alone.
    ranks: Any = None

    def unit(self, track: str, i: int) -> AbstractContextManager:
        """Around what uses the weights of a block: "blocks", or "modulation"."""
        return nullcontext() if self.streamed is None else self.streamed.unit(track, i)

    # ---- modulation ---------------------------------------------------------------------------------------------

    def modulation(self, timestep: Tensor, additional_t_cond: Tensor | None = None) -> Modulation:
        """The vectors of every block at the noise levels `timestep`, [conditions] in [0, 1], in the model's dtype."""
        like = timestep.new_empty(0, dtype=some_weight(self).dtype)
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
        inputs = img, txt, layout, modulation, controlnet_block_samples
        return self.forward_alone(*inputs) if self.ranks is None else self.ranks.forward(self, *inputs)

    def forward_alone(
        self,
        img: Tensor,
        txt: Tensor,
        layout: PackedLayout,
        modulation: Modulation,
        controlnet_block_samples: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`forward_packed` by this process, or by this rank for its rows."""
        blocks = self.transformer_blocks
        img = self.img_in(img)
        width = img.shape[-1]
        img_offsets = None if modulation.img[0].shape[0] == 1 else layout.segments
        txt_offsets = None if modulation.txt[0].shape[0] == 1 else layout.text_segments
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

    def calls_modules(self) -> bool:
        """Whether a forward calls every module (called.py); the drop-in leaves that to diffusers' forward."""
        return False

    def scaled(self, attention_kwargs: dict[str, Any] | None) -> AbstractContextManager:
        """Around a call with a scale for the LoRAs; the drop-in has put it on the adapters before."""
        return nullcontext()

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
                type of the weights; one picture, text or noise level goes to all samples.
            encoder_hidden_states_mask: [B, T], nonzero where a text token counts; None: everywhere.
            timestep: [B] noise levels in [0, 1].
            img_shapes: per sample a list of (frames, height, width) in tokens, the generated image first; a sample
                with fewer than L tokens is padded at the end.
            guidance: must be None. attention_kwargs: `scale` weighs the active LoRAs; nothing else has a use.
            controlnet_block_samples: residuals [B, L, width]. additional_t_cond: [B] int, Layered model.

        Returns:
            `.sample` or a tuple: [B, L, patch_size^2 * out_channels], zero at padding.
        """
        with self.scaled(attention_kwargs):
            inputs, finish = self.packed(
                hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes, guidance,
                controlnet_block_samples, additional_t_cond,
            )  # fmt: skip
            out = finish(self.forward_packed(*inputs))
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def packed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        encoder_hidden_states_mask: Tensor | None,
        timestep: Tensor | None,
        img_shapes: Sequence | None,
        guidance: Tensor | None,
        controlnet_block_samples: Sequence[Tensor] | None,
        additional_t_cond: Tensor | None,
    ) -> tuple[tuple, Callable[[Tensor], Tensor]]:
        """What `forward_packed` is given of a padded batch, and what makes a padded one of its result."""
        samples, rows = self._check_inputs(hidden_states, encoder_hidden_states, timestep, img_shapes, guidance)
        assert encoder_hidden_states is not None and timestep is not None  # checked, with a sentence
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states, encoder_hidden_states = self._typed(hidden_states, encoder_hidden_states)
        hidden_states = hidden_states.expand(samples, -1, -1)
        encoder_hidden_states = encoder_hidden_states.expand(samples, -1, -1)
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
        kept = len(img)

        def finish(out: Tensor) -> Tensor:
            if layout.targets is not None:
                out = out.new_zeros(kept, out.shape[-1]).index_copy(0, layout.targets, out)
            if layout.img_index is not None:
                padded = out.new_zeros(samples * rows, out.shape[-1])
                out = padded.index_copy(0, layout.img_index, out)
            return out.unflatten(0, (samples, rows))

        return (img, self.embed_text(txt), layout, modulation, controlnet_block_samples), finish

    def _typed(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """In the type of the weights."""
        dtype = some_weight(self).dtype
        return hidden_states.to(dtype), encoder_hidden_states.to(dtype)

    def modulation_of(self, timestep: Tensor, additional_t_cond: Tensor | None) -> Modulation:
        """Where `forward` gets its modulation vectors; the drop-in answers from its tables."""
        return self.sample_modulation(timestep, additional_t_cond)

    def target_images(self, img_shapes) -> int | None:
        """How many images of each sample the caller reads of the result; None: all. The drop-in knows its pipelines."""
        return None

    def layout_of(self, img_shapes, img_rows: int, mask: Tensor | None, txt: Tensor) -> PackedLayout:
        """The layout of a padded batch, kept for the next step of the same loop.

        A mask is recognised by identity, so that no value of a GPU is read again (but under `inference_mode`, where
        nothing else tells of a write); the cache holds it, so its id stays its own.
        """
        samples, txt_rows = txt.shape[:2]
        targets = self.target_images(img_shapes)
        shapes = normalize_shapes(img_shapes, samples)
        compiling = torch.compiler.is_compiling()

        def make() -> PackedLayout:
            config = self.config
            return pack_padded(
                shapes, img_rows, mask, txt_rows, samples, axes_dim=config.axes_dims_rope,
                layer3d=config.use_layer3d_rope, zero_cond_t=config.zero_cond_t, targets=targets,
                keep_padding=compiling and self.ranks is None, device=txt.device,
            )  # fmt: skip

        if compiling:
            return make()
        key = (shapes, targets, samples, img_rows, txt_rows, txt.device, None if mask is None else id(mask))
        cache: dict[tuple, KnownLayout] = self.__dict__.setdefault("_layouts", {})
        if key not in cache or not cache[key].holds():
            cache.pop(key, None)
            while len(cache) >= 8:
                cache.pop(next(iter(cache)))
            cache[key] = KnownLayout.of(make(), mask)
        return cache[key].layout

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
        return batch_size(hidden_states, encoder_hidden_states, timestep), hidden_states.shape[1]


def batch_size(hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> int:
    """The number of samples; of what goes to all of them there is one."""
    counts = [len(hidden_states), len(encoder_hidden_states), timestep.numel()]
    samples = max(counts)
    if any(n not in (1, samples) for n in counts):
        raise ValueError(
            "hidden_states, encoder_hidden_states and timestep must have one batch size, or one sample for all, "
            f"got {counts[0]}, {counts[1]} and {counts[2]}"
        )
    return samples
