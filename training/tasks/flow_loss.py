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
from qwen_image_fast.training.parallel.layout import Parallel
from qwen_image_fast.training.parallel.ulysses import split_layout


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


def flow_losses(
    transformer: Any, samples: Sequence[FlowSample], texts: Sequence[Tensor], parallel: Parallel | None = None
) -> Tensor:
    """mean over a sample's target values of (v(x_sigma, sigma, text, references) - (eps - x0))^2, for each sample.

    x_sigma = (1 - sigma) x0 + sigma eps (Liu et al., arXiv 2209.03003; in the sign of the released model). References
    follow the target in the image stream without noise and without loss. The loss of a batch is the mean of the result:
    a large image counts as much as a small one, and a sample as much as alone in its batch.

    Args:
        transformer: a `QwenImageTransformer2DModel`. samples: on its device, in any floating-point type.
        texts: condition encoder states of each sample, [tokens, joint_attention_dim].
        parallel: with cp > 1 this rank computes its rows, and the results of the cp ranks add up to the losses.

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
    states, img = torch.cat(list(texts)).to(weight.dtype), torch.cat(pieces).to(weight.dtype)
    if parallel is not None and parallel.sizes.cp > 1:
        layout, img_rows, txt_rows = split_layout(layout, parallel.cp_rank, parallel.sizes.cp, parallel.cp_group)
        modulation = transformer.sample_modulation(sigma)
        out = transformer.forward_packed(img[img_rows], transformer.embed_text(states[txt_rows]), layout, modulation)
        return _own_losses(out, eps - x0, torch.cat(kept), lengths, img_rows)
    txt = transformer.embed_text(states)
    out = transformer.forward_packed(img, txt, layout, transformer.sample_modulation(sigma))
    if len(out) != len(x0):
        out = out[torch.cat(kept).to(weight.device)]
    errors = (out.float() - (eps - x0)).square()
    if len(set(lengths)) == 1:
        return errors.view(len(samples), -1).mean(1)
    return torch.stack([e.mean() for e in errors.split(lengths)])


def _own_losses(out: Tensor, velocity: Tensor, kept: Tensor, lengths: Sequence[int], rows: slice) -> Tensor:
    """The part of each sample's loss from the image rows `rows`, which `out` has. kept: the rows of `velocity`."""
    own = (kept >= rows.start) & (kept < rows.stop)
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[own].to(out.device)
    own = own.to(out.device)
    errors = (out[kept.to(out.device)[own] - rows.start].float() - velocity[own]).square().mean(1)
    counts = torch.tensor(lengths, dtype=torch.float32, device=out.device)
    return errors.new_zeros(len(lengths)).index_add(0, sample, errors) / counts
