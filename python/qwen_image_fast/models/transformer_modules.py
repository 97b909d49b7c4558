"""The modules of the Qwen-Image transformer, under the names of the released checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_image_fast.models.called import QwenDoubleStreamAttnProcessor2_0, attend_by, called_block
from qwen_image_fast.models.hooks import at
from qwen_image_fast.models.packing import PackedLayout
from qwen_image_fast.models.transformer_block import Stream, run_block
from qwen_image_fast.ops.gelu_tanh import gelu_tanh
from qwen_image_fast.ops.layer_norm_modulate import layer_norm_modulate

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")  # of attention


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (float64 for float64)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)  # autocast
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


def sinusoid(t: Tensor, dim: int = 256, scale: float = 1000.0) -> Tensor:
    """[cos, sin] of scale * t * 10000^(-i / (dim / 2)); t: [N] in [0, 1] -> [N, dim] float32."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = scale * (t[:, None].float() * frequency[None])
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """linear_2(silu(linear_1(x)))."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class QwenTimestepProjEmbeddings(nn.Module):
    """The conditioning vector temb of a noise level, and of the RGB/RGBA flag of the Layered model."""

    def __init__(self, dim: int, use_additional_t_cond: bool = False):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.use_additional_t_cond = use_additional_t_cond
        if use_additional_t_cond:
            self.addition_t_embedding = nn.Embedding(2, dim)

    def forward(self, timestep: Tensor, hidden_states: Tensor, addition_t_cond: Tensor | None = None) -> Tensor:
        temb = self.timestep_embedder(sinusoid(timestep).to(hidden_states.dtype))
        if self.use_additional_t_cond:
            if addition_t_cond is None:
                raise ValueError("additional_t_cond must be given to a model with use_additional_t_cond, got None")
            temb = temb + self.addition_t_embedding(addition_t_cond).to(hidden_states.dtype)
        return temb


class JointAttention(nn.Module):
    """Projections and norms of both streams; `processor` computes with them if attention is called."""

    # What processors and caches of diffusers ask of attention.
    is_cross_attention = False
    fused_projections = False

    def __init__(self, dim: int, head_dim: int, eps: float):
        super().__init__()
        self.heads, self.inner_dim = dim // head_dim, dim
        self.processor: Any = QwenDoubleStreamAttnProcessor2_0()
        for name in _NORMS:
            self.add_module(name, RMSNorm(head_dim, eps))
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            self.add_module(name, nn.Linear(dim, dim))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    @property
    def has_processor(self) -> bool:
        """Whether a user's own computes attention."""
        return type(self.processor) is not QwenDoubleStreamAttnProcessor2_0

    def get_processor(self) -> Any:
        return self.processor

    def set_processor(self, processor: Any) -> None:
        """Let `processor(attn, hidden_states, encoder_hidden_states=, ...)` compute attention, one sample at a time.

        TypeError: it cannot be called.
        """
        if not callable(processor):
            raise TypeError(f"set_processor: processor must be callable, got {type(processor).__name__} {processor!r}")
        self._modules.pop("processor", None)  # one that is a module
        self.processor = processor

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """Both streams, [1, rows, width] of all samples, behind their output projections."""
        if not self.has_processor:
            return self.processor(self, hidden_states, encoder_hidden_states, layout)
        return attend_by(self.processor, self, hidden_states, encoder_hidden_states, layout)


class Projection(nn.Module):
    """gelu_tanh(proj(x))."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    """net.2(gelu_tanh(net.0.proj(x))), four times as wide inside; net.1 is a dropout of nothing."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([Projection(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class QwenImageTransformerBlock(nn.Module):
    """One double-stream block; `img_mod` and `txt_mod` give (shift, scale, gate) of attention, then of the MLP."""

    def __init__(self, dim: int, head_dim: int, eps: float = 1e-6):
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.attn = JointAttention(dim, head_dim, eps)
        self.img_mlp = FeedForward(dim)
        self.txt_mlp = FeedForward(dim)

    def forward(self, hidden_states: Any, encoder_hidden_states: Any, *args: Any, **named: Any) -> tuple[Any, Any]:
        """Of streams: `run_block`. Of hidden states: `called_block`, where every module of a block is called."""
        block = run_block if isinstance(hidden_states, Stream) else called_block
        return block(self, hidden_states, encoder_hidden_states, *args, **named)  # type: ignore[operator]


# Of a block: what the packed forward reads in the place of calling it.
_READ: dict[tuple[str, ...], type[nn.Module]] = {
    ("img_mod",): nn.Sequential, ("img_mod", "0"): nn.SiLU, ("txt_mod",): nn.Sequential, ("txt_mod", "0"): nn.SiLU,
    ("img_mlp",): FeedForward, ("img_mlp", "net", "0"): Projection, ("txt_mlp",): FeedForward,
    ("txt_mlp", "net", "0"): Projection,
}  # fmt: skip
_DROPOUTS = (("attn", "to_out", "1"), ("img_mlp", "net", "1"), ("txt_mlp", "net", "1"))


def is_changed(block: Any) -> bool:
    """Whether a module that is not called was replaced, has an epsilon of its own, or drops values."""
    norms = [getattr(block.attn, name) for name in _NORMS]
    if any(type(norm) is not RMSNorm or norm.eps != norms[0].eps for norm in norms):
        return True
    if any(type(at(block, path)) is not kind for path, kind in _READ.items()):
        return True
    dropouts: list[Any] = [at(block, path) for path in _DROPOUTS]
    return any(type(layer) is not nn.Dropout or (layer.training and layer.p > 0) for layer in dropouts)


class ModulationOut(nn.Module):
    """(scale, shift) of the output norm: the reverse of the blocks' order."""

    def __init__(self, dim: int):
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, temb: Tensor, offsets: Tensor | None = None) -> Tensor:
        """LN-modulate(x) for rows [rows, dim]. temb: [conditions, dim], or the vectors made of it; offsets: the first
        row of each, None: they are alike."""
        made = temb if temb.shape[-1] == 2 * x.shape[-1] else self.linear(self.silu(temb))
        scale, shift = made.chunk(2, dim=-1)
        return layer_norm_modulate(x, shift, scale, offsets)
