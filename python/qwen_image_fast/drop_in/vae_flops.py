"""How many multiplications of convolutions an image takes, with diffusers' VAE and with the fast one."""

from __future__ import annotations

import torch
from torch import nn

from qwen_image_fast.models.vae_conv import FEWEST_CHANNELS


def decoding_flops(vae, side: int = 1024) -> tuple[int, int]:
    """(diffusers, here): FLOPs of all convolutions that decode one image of `side`^2 pixels; nothing is computed."""
    cuda = next(vae.parameters()).is_cuda
    with torch.device("meta"):
        model = vae._original.from_config(vae.config)
        z = torch.empty(1, model.config.z_dim, 1, side // 8, side // 8)
    counted: list[tuple[int, int]] = []
    for module in model.decoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.register_forward_hook(lambda conv, args, out: counted.append(_count(conv, out, cuda)))
    model.decode(z)
    theirs, ours = (sum(part) for part in zip(*counted))
    return theirs, ours


def _count(conv: nn.Conv2d | nn.Conv3d, out: torch.Tensor, cuda: bool) -> tuple[int, int]:
    """One convolution as diffusers computes it, zeros included, and by the rule of `models/vae_conv.py`."""
    pixels = out.shape[-1] * out.shape[-2]
    per_tap = 2 * pixels * conv.in_channels * conv.out_channels
    taps, flat = conv.weight[0, 0].numel(), conv.weight[0, 0, ..., :, :].shape[-1] * conv.weight.shape[-2]
    upsamples = flat == 9 and isinstance(conv, nn.Conv2d)  # the only convolutions of the decoder that are both
    if cuda:
        return taps * per_tap, (4 if upsamples else flat) * per_tap
    if flat != 9 or conv.in_channels < FEWEST_CHANNELS:
        return taps * per_tap, flat * per_tap
    # Winograd: 36 products for 16 pixels; upsampling, 25 for 16 pixels of each phase.
    return taps * per_tap, (25 if upsamples else 36) * per_tap // 16
