"""How the VAE's two-dimensional path convolves: Winograd, CUDA or torch, by layer, and the weights kept for it.

An image here is `[B, C, H, W]` in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qwen_image_fast.ops import channel_norm_silu, conv2d, conv3x3, has_kernels, pack_conv3x3
from qwen_image_fast.ops.channel_norm_silu import add_channel_norm_silu
from qwen_image_fast.ops.conv2d import adds_in_its_kernel

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


def uses_cuda(conv: Conv, x: Tensor) -> bool:
    """Whether this convolution, of stride 1, goes by the op `conv2d` and CUDA's kernels."""
    return (
        x.is_cuda
        and has_kernels(x)
        and conv.weight.dtype == x.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cuda")
    )


def leave_sums(x: Tensor, *convs: Conv) -> bool:
    """Whether bias and residual are better added behind these convolutions, by `add_channel_norm_silu`: torch would add
    them in a pass each. Of gradients torch knows more."""
    if torch.is_grad_enabled():
        return False
    plain = all(c.bias is not None and not adds_in_its_kernel(x, flat_weight(c.weight)) for c in convs)
    return plain and all(uses_cuda(c, x) for c in convs)


# Transformed weights, as long as their parameter lives, with what tells whether it has changed.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(weight: Tensor, upsample: bool, pack: Callable[[Tensor, bool], Tensor] = pack_conv3x3) -> Tensor:
    """`pack` of the last temporal slice, kept until the parameter is written to, moved or cast.

    What changes the values behind torch's back (a write through `.data`) is not seen; `forget_packed_weights` is for
    that.
    """
    version = 0 if weight.is_inference() else weight._version
    state = (weight.data_ptr(), version, weight.dtype, upsample, pack)
    kept = _packed.get(weight)
    if kept is None or kept[0] != state:
        kept = (state, pack(flat_weight(weight).detach(), upsample))
        _packed[weight] = kept
    return kept[1]


def forget_packed_weights(model: nn.Module) -> None:
    """Drop what is kept for a model's parameters; it is made again where it is needed."""
    for weight in model.parameters():
        _packed.pop(weight, None)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of transformed weights that are kept for a model."""
    return sum(_packed[weight][1].nbytes for weight in model.parameters() if weight in _packed)


def packed_bytes_of(shapes: Mapping[str, Sequence[int]], itemsize: int, cuda: bool, encodes: bool) -> int:
    """`packed_bytes` of a VAE after its first image, from the shapes of its weights by name; on CUDA at most so many.

    Args:
        itemsize: bytes of a value of the model. cuda: its copies for the GPU's kernels; else Winograd's.
        encodes: whether it encodes images, too; it decodes them in any case.
    """
    total = 0
    for name, shape in shapes.items():
        if not (name.startswith("decoder.") or (encodes and name.startswith("encoder."))) or len(shape) < 4:
            continue
        out_channels, in_channels, kernel = shape[0], shape[1], tuple(shape[-2:])
        # The encoder's are of stride 2, which torch convolves.
        upsamples, halves = "upsamplers." in name, "down_blocks." in name and ".resample." in name
        if "time_conv" in name or halves:
            continue
        if cuda:
            total += itemsize * out_channels * in_channels * (16 if upsamples else kernel[0] * kernel[1])
        elif kernel == (3, 3) and in_channels >= FEWEST_CHANNELS:
            total += 4 * 36 * (4 if upsamples else 1) * -(-out_channels // 32) * 32 * in_channels
    return total


def flat_weight(weight: Tensor) -> Tensor:
    """The part of a weight that meets a single frame: [D, C, kh, kw]."""
    return weight[:, :, -1] if weight.ndim == 5 else weight


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
    added: Tensor | None = None,
    biased: bool = True,
) -> Tensor:
    """conv(f(x)) + residual for a 3x3 or 1x1 convolution of stride 1 that keeps height and width.

    f: `channel_norm_silu` with gamma, then nearest-neighbour doubling. See `ops.conv3x3`; the same without Winograd.

    Args:
        conv: has `weight` [D, C, kh, kw] or [D, C, T, kh, kw], of which the last slice counts, and `bias`.
        added: [C], which is added to x in front of f: the bias of the convolution that made x with `biased` False,
            without its bias. Both only where the two convolutions leave sums; x may be overwritten.
    """
    if x.shape[2] <= (0 if pad_rows else 2):
        return x.new_empty(x.shape[0], conv.weight.shape[0], 0, x.shape[3] * (2 if upsample else 1))
    if uses_cuda(conv, x):
        return _convolve_on_cuda(conv, x, gamma, residual, upsample, pad_rows, added, biased)
    if not uses_winograd(conv, x):
        return _convolve_directly(conv, x, gamma, residual, upsample, pad_rows)
    weight, rest = flat_weight(conv.weight), None if residual is None else channels_last(residual)
    training = torch.is_grad_enabled() and conv.weight.requires_grad
    packed = None if training else packed_weight(conv.weight, upsample)
    gamma = None if gamma is None else gamma.flatten()
    out = conv3x3(channels_last(x), weight, conv.bias, rest, gamma, upsample, pad_rows, packed)
    return out.permute(0, 3, 1, 2)


def convolve_twice(convs: tuple[Conv, Conv], gammas: tuple[Tensor, Tensor], x: Tensor, residual: Tensor) -> Tensor:
    """conv2(f2(conv1(f1(x)))) + residual, of whole images; the norm in between may take the bias of conv1 along."""
    late = leave_sums(x, *convs)
    h = convolve(convs[0], x, gammas[0], biased=not late)
    return convolve(convs[1], h, gammas[1], residual, added=convs[0].bias if late else None)


# Along one axis, what the two phases of an upsampled image see of the small one: (w0, w1 + w2) of rows i - 1 and i,
# (w0 + w1, w2) of rows i and i + 1.
_FOLDS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def pack_conv2d(weight: Tensor, upsample: bool) -> Tensor:
    """A weight [D, C, kh, kw] in channels-last memory; of 3x3 with upsampling, its four phases [4 D, C, 2, 2].

    Sums of weights are rounded once.
    """
    if upsample:
        wide = weight if weight.dtype == torch.float64 else weight.float()
        folds = torch.tensor(_FOLDS, dtype=wide.dtype, device=weight.device)
        weight = torch.einsum("pya,qxb,dcab->pqdcyx", folds, folds, wide).flatten(0, 2).to(weight.dtype)
    return weight.contiguous(memory_format=torch.channels_last)


def _convolve_on_cuda(
    conv: Conv,
    x: Tensor,
    gamma: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
    pad_rows: bool,
    added: Tensor | None,
    biased: bool,
) -> Tensor:
    """Norm and SiLU in one kernel; convolution, bias and residual in another where that is faster than cuDNN's. Else
    the two sums are a pass of their own, or a bias alone goes with the norm behind it.

    An upsampled image is made of its four phases, one convolution of the small image with 2x2 taps: fewer than half
    the products, and the large image is written once. "exact" convolves the large one.
    """
    y = channels_last(x)
    gamma = None if gamma is None else gamma.flatten()
    if added is not None:
        y = add_channel_norm_silu(y, added, gamma=gamma, inplace=True)
    elif gamma is not None:
        y = channel_norm_silu(y, gamma)
    fold = upsample and conv.weight.shape[-2:] == (3, 3) and getattr(conv, "convolution", "auto") == "auto"
    training = torch.is_grad_enabled() and conv.weight.requires_grad
    if training:
        weight = pack_conv2d(flat_weight(conv.weight), fold)
    else:
        weight = packed_weight(conv.weight, fold, pack_conv2d)
    if fold:
        return _join_phases(y, weight, conv.bias, pad_rows).permute(0, 3, 1, 2)
    if upsample:
        y = y.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        y = y if pad_rows else y[:, 1:-1].contiguous()
    height, width = (k // 2 for k in weight.shape[-2:])
    rest, padding = None if residual is None else channels_last(residual), (height if pad_rows else 0, width)
    if biased and (conv.bias is None or not leave_sums(x, conv)):
        return conv2d(y, weight, conv.bias, rest, padding).permute(0, 3, 1, 2)
    out = conv2d(y, weight, None, None, padding)
    if biased and conv.bias is not None:
        out = add_channel_norm_silu(out, conv.bias, rest, inplace=True)
    return out.permute(0, 3, 1, 2)


def _join_phases(x: Tensor, weight: Tensor, bias: Tensor | None, pad_rows: bool) -> Tensor:
    """Phases side by side to pixels; without gradients their bias is added on the way."""
    late = None if torch.is_grad_enabled() else bias
    before = None if bias is None or late is not None else bias.repeat(4)
    phases = conv2d(x, weight, before, None, (1 if pad_rows else 0, 1))
    height, width, channels = phases.shape[1] - 1, x.shape[2], phases.shape[3] // 4
    out = x.new_empty(x.shape[0], height, 2, width, 2, channels)
    for phase in range(4):
        p, q = divmod(phase, 2)
        part = phases[:, p : p + height, q : q + width, phase * channels : (phase + 1) * channels]
        if late is not None:
            torch.add(part, late, out=out[:, :, p, :, q])
        else:
            out[:, :, p, :, q] = part
    return out.view(x.shape[0], 2 * height, 2 * width, channels)


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
