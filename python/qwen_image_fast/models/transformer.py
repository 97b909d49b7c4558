"""The Qwen-Image transformer (MMDiT): its parameters, under the names of the released checkpoints.

What it computes is in `transformer_forward.py`, which the diffusers drop-in shares.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from qwen_image_fast.models.base import PretrainedModel, record_config
from qwen_image_fast.models.called import called_forward, called_modulation, finished
from qwen_image_fast.models.diffusers_hooks import AttentionMixin, CacheMixin, OffloadMixin
from qwen_image_fast.models.hooks import needs_calls
from qwen_image_fast.models.lora import scaled_adapters
from qwen_image_fast.models.modulation import Modulation, ModulationTables, restore_modulation_weights
from qwen_image_fast.models.packing import PackedLayout
from qwen_image_fast.models.peft_adapters import PeftAdapterMixin
from qwen_image_fast.models.rope import QwenEmbedLayer3DRope, QwenEmbedRope
from qwen_image_fast.models.stored_modulation import is_stored, stored_modulation
from qwen_image_fast.models.transformer_block import Stream
from qwen_image_fast.models.transformer_forward import TransformerForward
from qwen_image_fast.models.transformer_modules import (
    ModulationOut,
    QwenImageTransformerBlock,
    QwenTimestepProjEmbeddings,
    RMSNorm,
    is_changed,
)

# Widths of frame, height and width in a head of every released model.
RELEASED_ROPE = (16, 56, 56)


class QwenImageTransformer2DModel(
    TransformerForward, CacheMixin, AttentionMixin, OffloadMixin, PeftAdapterMixin, PretrainedModel
):
    """The MMDiT of Qwen-Image with diffusers' constructor, configuration and state-dict keys.

    Args:
        patch_size: side of a latent patch. in_channels: channels of a packed token (16 * 2 * 2).
        out_channels: latent channels of the output; None: in_channels.
        num_layers: double-stream blocks. attention_head_dim, num_attention_heads: width is their product.
        joint_attention_dim: width of the condition encoder's states.
        guidance_embeds: kept for config files; no released model has a guidance embedding.
        axes_dims_rope: RoPE widths of frame, height and width; their sum is attention_head_dim.
        zero_cond_t: reference images are modulated at t = 0 (Edit-2511).
        use_additional_t_cond, use_layer3d_rope: the Layered model.
    """

    part = "transformer"
    _supports_gradient_checkpointing = True
    _repeated_blocks = ("QwenImageTransformerBlock",)
    # Blocks are compiled, all in the one form that is the same for each of them.
    blocks_compiled = False
    # What runs within the hooks on the model itself.
    _inside = False

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
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = RELEASED_ROPE,
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ):
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or any(d % 2 for d in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope must be even and add up to attention_head_dim, {attention_head_dim}, "
                f"got {tuple(axes_dims_rope)}"
            )
        dim = num_attention_heads * attention_head_dim
        self.inner_dim = dim
        self.out_channels = out_channels or in_channels
        self.time_text_embed = QwenTimestepProjEmbeddings(dim, use_additional_t_cond)
        self.txt_norm = RMSNorm(joint_attention_dim)
        self.img_in = nn.Linear(in_channels, dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [QwenImageTransformerBlock(dim, attention_head_dim) for _ in range(num_layers)]
        )
        self.norm_out = ModulationOut(dim)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.gradient_checkpointing = False
        self.modulation_tables = ModulationTables()
        self.pos_embed = (QwenEmbedLayer3DRope if use_layer3d_rope else QwenEmbedRope)(axes_dims_rope)

    @classmethod
    def config_of_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The released configuration in the sizes of a file; ValueError where they do not tell all."""
        numbers = [int(m[1]) for name in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.", name))]
        try:
            width, in_channels = shapes["img_in.weight"]
            (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
            text, out = shapes["txt_in.weight"][1], shapes["proj_out.weight"][0]
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"from_single_file: the file lacks tensors of a Qwen-Image transformer ({error})"
            ) from error
        if head != sum(RELEASED_ROPE):
            raise ValueError(
                f"from_single_file: config must be given for heads of {head}, of which no model was released: the "
                "folder or hub name of the model that the file was made of"
            )
        layered = "time_text_embed.addition_t_embedding.weight" in shapes
        return {
            "in_channels": in_channels,
            "out_channels": out // 4,
            "num_layers": max(numbers) + 1,
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": text,
            "axes_dims_rope": list(RELEASED_ROPE),
            "use_additional_t_cond": layered,
            "use_layer3d_rope": layered,
        }

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pos_embed" and name in vars(self):
            raise AttributeError(
                "pos_embed must stay, as positions are part of the packed layout; diffusers' own model with accelerate "
                "calls another"
            )
        super().__setattr__(name, value)

    # ---- with every module called ---------------------------------------------------------------------------------

    def calls_modules(self) -> bool:
        """Whether the next forward calls every module, for what is on them (called.py)."""
        if self.blocks_compiled or self.is_cache_enabled:
            return True
        if torch.compiler.is_compiling():  # no hook can be looked for
            return any(block.attn.has_processor for block in self.transformer_blocks)
        return (
            needs_calls(self)
            or type(self.norm_out) is not ModulationOut
            or type(self.norm_out.silu) is not nn.SiLU
            or any(map(is_changed, self.transformer_blocks))
        )

    def within_hooks(self, work: Callable[[], Any]) -> Any:
        """work() as this model's forward, where hooks that bring weights for it are on the model itself."""
        forward: Any = self.forward
        return work() if self._inside else forward(work)

    @functools.wraps(TransformerForward.forward)
    def forward(self, hidden_states: Any, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        if "forward" not in vars(self):
            return super().forward(hidden_states, *args, **named)
        before, self._inside = self._inside, True
        try:
            if callable(hidden_states):  # of `within_hooks`; a tensor is not
                return hidden_states()
            return super().forward(hidden_states, *args, **named)
        finally:
            self._inside = before

    def _typed(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if "forward" not in vars(self.img_in):
            return super()._typed(hidden_states, encoder_hidden_states)
        return hidden_states.to(self.dtype), encoder_hidden_states.to(self.dtype)

    def embed_text(self, txt: Tensor) -> Tensor:
        if "forward" not in vars(self):
            return super().embed_text(txt)
        return self.within_hooks(functools.partial(super().embed_text, txt))

    def modulation(self, timestep: Tensor, additional_t_cond: Tensor | None = None) -> Modulation:
        if is_stored(self):
            return stored_modulation(self, timestep)
        if not self.calls_modules():
            return super().modulation(timestep, additional_t_cond)

        def conditions() -> Modulation:
            like = timestep.new_empty(0, dtype=self.dtype)
            return called_modulation(self, self.time_text_embed(timestep.to(like.dtype), like, additional_t_cond))

        return self.within_hooks(conditions) if "forward" in vars(self) else conditions()

    def forward_packed(
        self,
        img: Tensor,
        txt: Tensor,
        layout: PackedLayout,
        modulation: Modulation,
        controlnet_block_samples: Sequence[Tensor] | None = None,
    ) -> Tensor:
        inputs = img, txt, layout, modulation, controlnet_block_samples
        if "forward" not in vars(self):
            return super().forward_packed(*inputs)
        return self.within_hooks(functools.partial(super().forward_packed, *inputs))

    def forward_alone(
        self,
        img: Tensor,
        txt: Tensor,
        layout: PackedLayout,
        modulation: Modulation,
        controlnet_block_samples: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if self.calls_modules():
            return called_forward(self, img, txt, layout, modulation, controlnet_block_samples)
        return super().forward_alone(img, txt, layout, finished(self, modulation), controlnet_block_samples)

    def compile_repeated_blocks(self, *args: Any, **options: Any) -> None:
        """`torch.compile` each block, with these arguments; all are one graph, in which every module is called.

        `torch.compile(model)` compiles the fused ops with the rest.
        """
        for block in self.transformer_blocks:
            block.compile(*args, **options)
        self.blocks_compiled = True

    def scaled(self, attention_kwargs: dict[str, Any] | None) -> AbstractContextManager:
        if attention_kwargs and self.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "attention_kwargs must be None with gradient checkpointing, whose second computation would not know "
                "the scale: weight the LoRAs by set_adapters"
            )
        return scaled_adapters(self, attention_kwargs)

    def run_block(self, block: Any, *args: Any) -> tuple[Stream, Stream]:
        return block(*args)

    def state_dict(self, *args, **kwargs):
        """As ever; modulation weights that were released are read again first, so that none is written empty."""
        restore_modulation_weights(self)
        return super().state_dict(*args, **kwargs)

    def __getstate__(self):
        """Without the layouts of recent calls, which are known by the identity of masks that a copy does not have, and
        without the processes that compute together: a copy computes alone."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_layouts", "_said", "ranks")}

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.gradient_checkpointing

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False
