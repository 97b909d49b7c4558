"""The transformer's velocities of packed samples at any noise levels: what every loss of training is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_image_fast.models.packing import PackedLayout, pack
from qwen_image_fast.models.rope import ImageShape


@dataclass
class FlowSample:
    """One sample in latent space.

    Attributes:
        target: x0, [tokens, channels], packed and normalised latents of the image.
        shape: its (frames, height, width) in tokens.
        noise: eps, like `target`. sigma: noise level in [0, 1].
        references, reference_shapes: the latents of 0..N reference images and their shapes.
        weights: float32 [tokens], what each counts in its loss, not all 0; None: all alike.
        velocity: like `target`, what its loss compares with; None: eps - x0.
    """

    target: Tensor
    shape: ImageShape
    noise: Tensor
    sigma: float
    references: Sequence[Tensor] = ()
    reference_shapes: Sequence[ImageShape] = ()
    weights: Tensor | None = None
    velocity: Tensor | None = None


@dataclass
class Packed:
    """What the transformer is asked for. img, states: rows in its type; kept: the rows of `img` that are targets;
    sigma: float32 [samples]."""

    layout: PackedLayout
    img: Tensor
    states: Tensor
    kept: Tensor
    sigma: Tensor


def packed(transformer: Any, samples: Sequence[FlowSample], noisy: Sequence[Tensor], texts: Sequence[Tensor]) -> Packed:
    """Samples whose targets stand at their noise levels as `noisy`, [tokens, channels] each; their references follow
    them in the image stream without noise."""
    weight, config = transformer.proj_out.weight, transformer.config
    pieces, kept, start = [], [], 0
    for sample, target in zip(samples, noisy):
        pieces += [target, *(r.to(target) for r in sample.references)]
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
    sigma = torch.tensor([s.sigma for s in samples], dtype=torch.float32, device=weight.device)
    states, img = torch.cat(list(texts)).to(weight.dtype), torch.cat(pieces).to(weight.dtype)
    return Packed(layout, img, states, torch.cat(kept), sigma)


def forward(transformer: Any, given: Packed) -> Tensor:
    """v of all targets' rows one after another, in the transformer's type."""
    txt = transformer.embed_text(given.states)
    # What is read when it is used has no gradients, and learns nothing.
    with torch.set_grad_enabled(torch.is_grad_enabled() and transformer.streamed is None):
        modulation = transformer.sample_modulation(given.sigma)
    out = transformer.forward_packed(given.img, txt, given.layout, modulation)
    return out if len(out) == len(given.kept) else out[given.kept.to(out.device)]


def velocities(
    transformer: Any, samples: Sequence[FlowSample], noisy: Sequence[Tensor], texts: Sequence[Tensor]
) -> list[Tensor]:
    """v(noisy, sigma, text, references) of each sample, float32 [tokens, channels]."""
    out = forward(transformer, packed(transformer, samples, noisy, texts)).float()
    return list(out.split([len(x) for x in noisy]))


def interpolated(samples: Sequence[FlowSample]) -> list[Tensor]:
    """x_sigma = (1 - sigma) x0 + sigma eps of each sample, float32."""
    return [(1 - s.sigma) * s.target.float() + s.sigma * s.noise.float() for s in samples]


def velocity_errors(predicted: Sequence[Tensor], samples: Sequence[FlowSample]) -> Tensor:
    """mean over a sample's values of (v - (eps - x0))^2, float32 [samples]."""
    return torch.stack([(v - (s.noise.float() - s.target.float())).square().mean() for v, s in zip(predicted, samples)])
