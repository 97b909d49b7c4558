"""ControlNets of Qwen-Image: a few transformer blocks whose outputs are added to those of the big model.

    h_0 = img_in(x) + controlnet_x_embedder(condition);  (h_i, txt_i) = block_i(h_{i-1}, txt_{i-1})
    residual_i = scale controlnet_blocks_i(h_i), added behind every ceil(n / blocks)-th of the n transformer blocks

Source: https://github.com/huggingface/diffusers/pull/12215 and the checkpoints it reads, InstantX's union (canny, soft
edge, depth, pose) and inpainting ControlNets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_image_fast.models.base import PretrainedModel, record_config
from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.outputs import Output
from qwen_image_fast.models.packing import PackedLayout, pack_padded
from qwen_image_fast.models.transformer_block import BlockVectors, Stream, run_block
from qwen_image_fast.models.transformer_modules import (
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
    RMSNorm,
)
from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate


@dataclass
class QwenImageControlNetOutput(Output):
    controlnet_block_samples: list[Tensor]


class QwenImageControlNetModel(PretrainedModel):
    """A ControlNet with diffusers' constructor, configuration and state-dict keys.

    Args:
        extra_condition_channels: channels of a condition token beyond `in_channels`: 4 for inpainting (the mask of its
            2 x 2 latent pixels). The rest: as in `QwenImageTransformer2DModel`.
    """

    @record_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        extra_condition_channels: int = 0,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.inner_dim = dim
        self.time_text_embed = QwenTimestepProjEmbeddings(dim)
        self.txt_norm = RMSNorm(joint_attention_dim)
        self.img_in = nn.Linear(in_channels, dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [QwenImageTransformerBlock(dim, attention_head_dim) for _ in range(num_layers)]
        )
        self.controlnet_blocks = nn.ModuleList([_zero(nn.Linear(dim, dim)) for _ in range(num_layers)])
        self.controlnet_x_embedder = _zero(nn.Linear(in_channels + extra_condition_channels, dim))

    @classmethod
    def from_transformer(
        cls,
        transformer: Any,
        num_layers: int = 5,
        attention_head_dim: int | None = None,
        num_attention_heads: int | None = None,
        load_weights_from_transformer: bool = True,
        extra_condition_channels: int = 0,
    ) -> QwenImageControlNetModel:
        """A ControlNet to train: the first blocks and the embeddings of `transformer`, zero outputs.

        Heads have the transformer's sizes, and may have others only where its weights are not taken: ValueError.
        """
        config = {k: v for k, v in transformer.config.items() if k in _CONFIG}
        heads = {"attention_head_dim": attention_head_dim, "num_attention_heads": num_attention_heads}
        for name, value in heads.items():
            if value not in (None, config[name]) and load_weights_from_transformer:
                raise ValueError(
                    f"from_transformer: {name} must be the transformer's, {config[name]}, got {value}; others need "
                    "load_weights_from_transformer=False"
                )
        config |= {name: value for name, value in heads.items() if value is not None}
        model = cls(**{**config, "num_layers": num_layers, "extra_condition_channels": extra_condition_channels})
        if not load_weights_from_transformer:
            return model.to(transformer.device, transformer.dtype)
        own = model.state_dict()
        state = {k: v for k, v in transformer.state_dict().items() if k in own}
        model.load_state_dict({**own, **state})
        return model.to(transformer.device, transformer.dtype)

    def modulation(self, timestep: Tensor) -> Modulation:
        """The vectors of every block at the noise levels `timestep`, [conditions] in [0, 1]."""
        like = timestep.new_empty(0, dtype=self.img_in.weight.dtype)
        temb = F.silu(self.time_text_embed(timestep.to(like.dtype), like))
        blocks: Any = self.transformer_blocks
        return Modulation([b.img_mod[1](temb) for b in blocks], [b.txt_mod[1](temb) for b in blocks], temb)

    def embed_text(self, txt: Tensor) -> Tensor:
        """Condition encoder states [text rows, joint_attention_dim] -> [text rows, width]."""
        return self.txt_in(self.txt_norm(txt))

    def forward_packed(
        self, img: Tensor, condition: Tensor, txt: Tensor, layout: PackedLayout, modulation: Modulation
    ) -> list[Tensor]:
        """The residuals, one [image rows, width] for each block, before scaling.

        Args:
            img: [image rows, in_channels] noisy latent tokens. condition: [image rows, in_channels + extra channels].
            txt: [text rows, width], from `embed_text`. layout, modulation: as in the transformer.
        """
        x = self.img_in(img) + self.controlnet_x_embedder(condition)
        width = x.shape[-1]
        img_mods = [BlockVectors(*m.split(width, dim=1)) for m in modulation.img]
        txt_mods = [BlockVectors(*m.split(width, dim=1)) for m in modulation.txt]
        img_offsets = None if len(modulation.final) == 1 else layout.segments
        txt_offsets = None if len(modulation.final) == 1 else layout.cu_txt
        img_s = Stream(x, layer_norm_modulate(x, img_mods[0].shift1, img_mods[0].scale1, img_offsets))
        txt_s = Stream(txt, layer_norm_modulate(txt, txt_mods[0].shift1, txt_mods[0].scale1, txt_offsets))
        residuals = []
        for i, (block, out) in enumerate(zip(self.transformer_blocks, self.controlnet_blocks)):
            last = i == len(self.transformer_blocks) - 1
            # Behind the last block no norm follows; its own stands in, and the result is not used.
            follows = img_mods[i if last else i + 1]
            next_txt = None if last else (txt_mods[i + 1].shift1, txt_mods[i + 1].scale1)
            img_s, txt_s = run_block(
                block, img_s, txt_s, layout, img_mods[i], txt_mods[i], (follows.shift1, follows.scale1), next_txt,
                img_offsets, txt_offsets,
            )  # fmt: skip
            residuals.append(out(img_s.x))
        return residuals

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> QwenImageControlNetOutput | list[Tensor]:
        """diffusers' call, on padded batches [samples, tokens, channels]; residuals are [samples, tokens, width].

        Inputs become the type of the weights. ValueError: `joint_attention_kwargs` holds anything, as no LoRA goes into
        a ControlNet of this package.
        """
        if joint_attention_kwargs:
            raise ValueError(
                f"joint_attention_kwargs must be None, as no LoRA goes into a ControlNet here, got "
                f"{', '.join(joint_attention_kwargs)}"
            )
        if encoder_hidden_states is None or timestep is None or img_shapes is None:
            raise ValueError("encoder_hidden_states, timestep and img_shapes must be given, got None")
        samples, rows = hidden_states.shape[:2]
        if controlnet_cond.shape[:2] != (samples, rows):
            raise ValueError(
                f"controlnet_cond must have the samples and tokens of hidden_states, {(samples, rows)}, "
                f"got {tuple(controlnet_cond.shape[:2])}"
            )
        layout = pack_padded(
            img_shapes, rows, encoder_hidden_states_mask, encoder_hidden_states.shape[1], samples,
            axes_dim=self.config.axes_dims_rope, keep_padding=torch.compiler.is_compiling(),
            device=hidden_states.device,
        )  # fmt: skip
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states, controlnet_cond, encoder_hidden_states = (
                t.to(self.dtype) for t in (hidden_states, controlnet_cond, encoder_hidden_states)
            )
        txt = encoder_hidden_states.flatten(0, 1)
        txt = self.embed_text(txt if layout.txt_index is None else txt[layout.txt_index])
        modulation = self.modulation(timestep.expand(samples))
        found = self.forward_packed(hidden_states.flatten(0, 1), controlnet_cond.flatten(0, 1), txt, layout, modulation)
        residuals = [r.unflatten(0, (samples, rows)) * conditioning_scale for r in found]
        return QwenImageControlNetOutput(residuals) if return_dict else residuals


class QwenImageMultiControlNetModel(nn.Module):
    """Several ControlNets as one, whose residuals add up; a single one takes any number of pictures.

    Args:
        controlnets: in `nets`. ValueError: none. TypeError: another kind of model.
    """

    def __init__(self, controlnets: Sequence[QwenImageControlNetModel]) -> None:
        super().__init__()
        if not controlnets:
            raise ValueError("QwenImageMultiControlNetModel: controlnets must be one or several, got none")
        for net in controlnets:
            if not isinstance(net, QwenImageControlNetModel):
                kind = f"{type(net).__module__}.{type(net).__name__}"
                raise TypeError(
                    f"QwenImageMultiControlNetModel: controlnets must be of this package's QwenImageControlNetModel, "
                    f"got {kind}"
                )
        self.nets = nn.ModuleList(controlnets)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> QwenImageControlNetOutput | list[Tensor]:
        """As a ControlNet's, with one condition and one scale for each of the nets, or any number for a single one."""
        counts = len(controlnet_cond), len(conditioning_scale)
        if counts[0] != counts[1] or counts[0] == 0 or len(self.nets) not in (1, counts[0]):
            raise ValueError(
                "QwenImageMultiControlNetModel: controlnet_cond and conditioning_scale must have one entry for each of "
                f"{len(self.nets)} nets, or any number for a single one, got {counts[0]} and {counts[1]}"
            )
        total: list[Tensor] = []
        for i, (cond, scale) in enumerate(zip(controlnet_cond, conditioning_scale)):
            own = self.nets[i % len(self.nets)](
                hidden_states, cond, scale, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes,
                joint_attention_kwargs, return_dict=False,
            )  # fmt: skip
            if total and len(own) != len(total):
                raise ValueError(
                    "QwenImageMultiControlNetModel: nets must have one number of blocks, got "
                    f"{len(total)} and {len(own)}"
                )
            total = [a + b for a, b in zip(total, own)] if total else own
        return QwenImageControlNetOutput(total) if return_dict else total


_CONFIG = (
    "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "axes_dims_rope",
)  # fmt: skip


def _zero(linear: nn.Linear) -> nn.Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear
