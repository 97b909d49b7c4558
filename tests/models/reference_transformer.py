"""diffusers' transformer as the reference: the same random weights, and a version that computes wholly in float64."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

CONFIG = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3, "attention_head_dim": 32,
    "num_attention_heads": 4, "joint_attention_dim": 48, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip


@dataclass
class Case:
    shapes: list
    text: int
    mask: list | None = None
    t_cond: list | None = None
    controlnet: int = 0
    config: dict = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, like: torch.dtype | None = None) -> dict:
        """Inputs rounded to `like` (default: dtype), so that two precisions can start from the same numbers."""
        torch.manual_seed(1)
        batch = len(self.shapes)
        rows = max(sum(f * h * w for f, h, w in sample) for sample in self.shapes)
        config = {**CONFIG, **self.config}
        width = config["num_attention_heads"] * config["attention_head_dim"]

        def tensor(*shape):
            return torch.randn(*shape).to(like or dtype).to(dtype)

        inputs = {
            "hidden_states": tensor(batch, rows, 64),
            "encoder_hidden_states": tensor(batch, self.text, 48),
            "encoder_hidden_states_mask": None if self.mask is None else torch.tensor(self.mask),
            "timestep": torch.tensor([0.75, 0.3125, 0.5])[:batch].to(dtype),
            "img_shapes": self.shapes,
        }
        if self.t_cond:
            inputs["additional_t_cond"] = torch.tensor(self.t_cond)
        if self.controlnet:
            inputs["controlnet_block_samples"] = [tensor(batch, rows, width) for _ in range(self.controlnet)]
        return inputs

    def assert_twice(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        assert ours.isfinite().all() and ours.dtype == theirs.dtype
        for name, measure in (("max", torch.amax), ("rms", lambda t: t.pow(2).mean().sqrt())):
            got, allowed = (measure((t.double() - exact).abs()) for t in (ours, theirs))
            assert got <= 2 * allowed, f"{name} error {got:.3e}, diffusers {allowed:.3e}"


def make_pair(case: Case, dtype: torch.dtype, like: torch.dtype | None = None):
    """Our model and diffusers', with the same weights, rounded to `like` before `dtype`."""
    from diffusers import QwenImageTransformer2DModel as Diffusers

    config = {**CONFIG, **case.config}
    torch.manual_seed(0)
    theirs = Diffusers(**config)
    for name, p in theirs.named_parameters():
        with torch.no_grad():
            p.normal_(0, 0.2) if p.dim() == 1 else p.normal_(0, 1 / p.shape[-1] ** 0.5)
            if "norm" in name and name.endswith("weight") and p.dim() == 1:
                p.add_(1)
    theirs = theirs.to(like or dtype).to(dtype).eval()
    ours = QwenImageTransformer2DModel(**config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@contextlib.contextmanager
def exact_diffusers():
    """diffusers rounds to float32 in RMSNorm and RoPE whatever the dtype; here it keeps float64 inputs in float64."""
    import diffusers.models.normalization as normalization
    import diffusers.models.transformers.transformer_qwenimage as module

    def rope(x, freqs_cis, use_real=True, use_real_unbind_dim=-1):
        rotated = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * freqs_cis.to(torch.complex128)[:, None]
        return torch.view_as_real(rotated).flatten(3).to(x.dtype)

    def rms(self, x):
        x64 = x.double()
        return (x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)

    saved = module.apply_rotary_emb_qwen, normalization.RMSNorm.forward
    module.apply_rotary_emb_qwen, normalization.RMSNorm.forward = rope, functools.partialmethod(rms)
    try:
        yield
    finally:
        module.apply_rotary_emb_qwen, normalization.RMSNorm.forward = saved
