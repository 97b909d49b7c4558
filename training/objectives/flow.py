"""Rectified flow on packed batches: samples of any size, any text length and any number of references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_image_fast.models.packing import pack
from qwen_image_fast.models.rope import ImageShape


@dataclass
class FlowSample:
    """One sample in latent space.

    Attributes:
        target: x0, [tokens, channels], packed and normalised latents of the image.
        shape: its (frames, height, width) in tokens.
        noise: eps, like `target`. sigma: noise level in [0, 1].
        references, reference_shapes: the latents of 0..N reference images and their shapes.
    """

    target: Tensor
    shape: ImageShape
    noise: Tensor
    sigma: float
    references: Sequence[Tensor] = ()
    reference_shapes: Sequence[ImageShape] = ()


def logit_normal(rng: np.random.Generator, mean: float = 0.0, std: float = 1.0) -> float:
    """sigma = 1 / (1 + exp(-(mean + std n))), n standard normal (Qwen-Image report, arXiv 2508.02324, section 4.1)."""
    return float(1.0 / (1.0 + np.exp(-(mean + std * rng.standard_normal()))))


def flow_losses(transformer: Any, samples: Sequence[FlowSample], texts: Sequence[Tensor]) -> Tensor:
    """mean over a sample's target values of (v(x_sigma, sigma, text, references) - (eps - x0))^2, for each sample.

    x_sigma = (1 - sigma) x0 + sigma eps (Liu et al., arXiv 2209.03003; in the sign of the released model). References
    follow the target in the image stream without noise and without loss. The loss of a batch is the mean of the result:
    a large image counts as much as a small one, and a sample as much as alone in its batch.

    Args:
        transformer: a `QwenImageTransformer2DModel`. samples: on its device, in any floating-point type.
        texts: condition encoder states of each sample, [tokens, joint_attention_dim].

    Returns:
        float32 [samples]. The interpolation and the loss are computed in float32.
    """
    weight, config = transformer.proj_out.weight, transformer.config
    lengths = [len(s.target) for s in samples]
    sigma = torch.tensor([s.sigma for s in samples], dtype=torch.float32, device=weight.device)
    x0 = torch.cat([s.target for s in samples]).float()
    eps = torch.cat([s.noise for s in samples]).float()
    rows = sigma.repeat_interleave(torch.tensor(lengths, device=weight.device), output_size=len(x0))[:, None]
    noisy = (1 - rows) * x0 + rows * eps

    pieces, kept, start = [], [], 0
    for sample, target in zip(samples, noisy.split(lengths)):
        pieces += [target, *(r.to(noisy) for r in sample.references)]
        kept.append(torch.arange(start, start + len(target)))
        start += len(target) + sum(len(r) for r in sample.references)
    layout = pack(
        tuple((s.shape, *s.reference_shapes) for s in samples),
        [len(t) for t in texts],
        axes_dim=config.axes_dims_rope,
        layer3d=config.use_layer3d_rope,
        zero_cond_t=config.zero_cond_t,
        device=weight.device,
    )
    txt = transformer.embed_text(torch.cat(list(texts)).to(weight.dtype))
    img = torch.cat(pieces).to(weight.dtype)
    out = transformer.forward_packed(img, txt, layout, transformer.sample_modulation(sigma))
    if len(out) != len(x0):
        out = out[torch.cat(kept).to(weight.device)]
    errors = (out.float() - (eps - x0)).square()
    if len(set(lengths)) == 1:
        return errors.view(len(samples), -1).mean(1)
    return torch.stack([e.mean() for e in errors.split(lengths)])
