"""How the VAE's two-dimensional path convolves: Winograd or torch, by layer, and the transformed weights kept for it.

An image here is `[B, C, H, W]` in channels-last memory.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.weak import WeakTensorKeyDictionary

from qwen_image_fast.ops import channel_norm_silu, conv3x3, pack_conv3x3

# "auto": Winograd where it is faster; "exact": every sum in the order of a direct convolution.
Convolution = Literal["auto", "exact"]
Conv = nn.Conv2d | nn.Conv3d
# Measured (docs/vae.md): with fewer channels in, the transforms cost more than the products they save.
FEWEST_CHANNELS = 16


def uses_winograd(conv: Conv, x: Tensor) -> bool:
    """Whether `conv3x3` takes this convolution of a weight [D, C, (T,) 3, 3] with stride 1 and padding 1."""
    return (
        getattr(conv, "convolution", "auto") == "auto"
        and x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and conv.weight.dtype == x.dtype
        and conv.weight.shape[-2:] == (3, 3)
        and conv.weight.shape[1] >= FEWEST_CHANNELS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")  # which chooses another type for every convolution
    )


# Transformed weights, as long as their parameter lives, with what tells whether it has changed.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(weight: Tensor, upsample: bool) -> Tensor:
    """`pack_conv3x3` of the last temporal slice, kept until the parameter is written to, moved or cast.

    What changes the values behind torch's back (a write through `.data`) is not seen; `forget_packed_weights` is for
    that.
    """
    version = 0 if weight.is_inference() else weight._version
    state = (weight.data_ptr(), version, weight.dtype, upsample)
    kept = _packed.get(weight)
    if kept is None or kept[0] != state:
        kept = (state, pack_conv3x3(flat_weight(weight), upsample))
        _packed[weight] = kept
    return kept[1]


def forget_packed_weights(model: nn.Module) -> None:
    """Drop what is kept for a model's parameters; it is made again where it is needed."""
    for weight in model.parameters():
        _packed.pop(weight, None)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of transformed weights that are kept for a model."""
    return sum(_packed[weight][1].nbytes for weight in model.parameters() if weight in _packed)


def flat_weight(weight: Tensor) -> Tensor:
    """The part of a weight that meets a single frame: [D, C, kh, kw]."""
    return weight[:, :, -1] if weight.ndim == 5 else weight


def is_bare(*modules: nn.Module) -> bool:
    """Whether nothing of the user's runs when these are called: no hook, no other forward."""
    return not nn_module._has_any_global_hook() and not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


def channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels-last memory -> [B, H, W, C], contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def convolve(
    conv: Conv,
    x: Tensor,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
    pad_rows: bool = True,
) -> Tensor:
    """conv(f(x)) + residual for a 3x3 or 1x1 convolution of stride 1 that keeps height and width.

    f: `channel_norm_silu` with gamma, then nearest-neighbour doubling. See `ops.conv3x3`; the same without Winograd.

    Args:
        conv: has `weight` [D, C, kh, kw] or [D, C, T, kh, kw], of which the last slice counts, and `bias`.
    """
    if x.shape[2] <= (0 if pad_rows else 2):
        return x.new_empty(x.shape[0], conv.weight.shape[0], 0, x.shape[3] * (2 if upsample else 1))
    if not uses_winograd(conv, x):
        return _convolve_directly(conv, x, gamma, residual, upsample, pad_rows)
    weight, rest = flat_weight(conv.weight), None if residual is None else channels_last(residual)
    training = torch.is_grad_enabled() and conv.weight.requires_grad
    packed = None if training else packed_weight(conv.weight, upsample)
    gamma = None if gamma is None else gamma.flatten()
    out = conv3x3(channels_last(x), weight, conv.bias, rest, gamma, upsample, pad_rows, packed)
    return out.permute(0, 3, 1, 2)


def _convolve_directly(
    conv: Conv, x: Tensor, gamma: Tensor | None, residual: Tensor | None, upsample: bool, pad_rows: bool
) -> Tensor:
    if gamma is not None:
        x = norm_silu(x, gamma)
    weight = flat_weight(conv.weight)
    height, width = (k // 2 for k in weight.shape[-2:])
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
        if not pad_rows:  # rows 1 ... 2H - 2 are what the result depends on
            x = x[:, :, 1:-1]
    out = F.conv2d(x, weight, conv.bias, padding=(height if pad_rows else 0, width))
    return out if residual is None else out + residual


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """`channel_norm_silu` of an image; gamma and bias of any shape with C elements."""
    bias = None if bias is None else bias.flatten()
    return channel_norm_silu(channels_last(x), gamma.flatten(), bias, silu).permute(0, 3, 1, 2)
