"""How many multiplications of convolutions an image takes, with diffusers' VAE and with the fast one."""

from __future__ import annotations

import torch
from torch import nn

from qwen_image_fast.models.vae_conv import FEWEST_CHANNELS, Convolution


def decoding_flops(vae, side: int = 1024, convolution: Convolution = "auto") -> tuple[int, int]:
    """(diffusers, here): FLOPs of all convolutions that decode one image of `side`^2 pixels; nothing is computed.

    Of Winograd's algorithm, those of its products; its transforms, which are sums, are not counted.
    """
    weight = next(vae.parameters())
    auto = convolution == "auto" and (weight.is_cuda or weight.dtype != torch.float64)
    with torch.device("meta"):
        model = vae._original.from_config(vae.config)
        ratio = model.spatial_compression_ratio
        z = torch.empty(1, model.config.z_dim, 1, side // ratio, side // ratio)
    counted: list[tuple[int, int]] = []
    for module in model.decoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.register_forward_hook(
                lambda conv, args, out: counted.append(_count(conv, out, auto, weight.is_cuda))
            )
    model.decode(z)
    theirs, ours = (sum(part) for part in zip(*counted))
    return theirs, ours


def _count(conv: nn.Conv2d | nn.Conv3d, out: torch.Tensor, auto: bool, cuda: bool) -> tuple[int, int]:
    """One convolution as diffusers computes it, zeros included, and by the rule of `models/vae_conv.py`."""
    pixels = out.shape[-1] * out.shape[-2]
    per_tap = 2 * pixels * conv.in_channels * conv.out_channels
    taps, flat = conv.weight[0, 0].numel(), conv.weight.shape[-1] * conv.weight.shape[-2]
    upsamples = flat == 9 and type(conv) is nn.Conv2d  # the only convolutions of the decoder that are both
    if auto and cuda:
        return taps * per_tap, (4 if upsamples else flat) * per_tap
    if not auto or flat != 9 or conv.in_channels < FEWEST_CHANNELS:
        return taps * per_tap, flat * per_tap
    # Winograd: 36 products for 16 pixels; upsampling, 25 for 16 pixels of each phase.
    return taps * per_tap, (25 if upsamples else 36) * per_tap // 16
