"""Layers of the Qwen-Image VAE, each for one image and for a chunk of a video.

Every layer is called as `layer(x, stream)` with either

- an image `x [B, C, H, W]` in channels-last memory, `stream=None`: the network is then purely two-dimensional,
- some rows of an image, with one `RowStream` shared by all strips, or
- a chunk of consecutive frames `x [B, C, T, H, W]`, with one `FrameStream` shared by all chunks of the video.

Module and parameter names, and parameter shapes, are those of `diffusers.AutoencoderKLQwenImage`, so that its state
dict loads with `strict=True`. That includes the five-dimensional convolution weights that an image uses one third of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_image_fast.models.hooks import is_bare
from qwen_image_fast.models.vae_conv import Conv, Convolution, convolve, convolve_twice, norm_silu
from qwen_image_fast.models.vae_streams import FrameStream, RowStream, run_in_strips
from qwen_image_fast.models.wide_attention import wide_attention
from qwen_image_fast.ops import has_kernels

Stream = FrameStream | RowStream | None


def per_frame(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `fn`, which takes images `[N, C, H, W]`, to an image batch or to every frame of `x [B, C, T, H, W]`."""
    if x.ndim == 4:
        return fn(x)
    batch, frames = x.shape[0], x.shape[2]
    y = fn(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, frames)).transpose(1, 2)


def convolve_rows(
    conv: Conv,
    x: Tensor,
    stream: Stream,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """`convolve` of a whole image, or of what a strip completes."""
    if not isinstance(stream, RowStream):
        return convolve(conv, x, gamma, residual, upsample)
    if conv.weight.shape[-1] == 1:
        return convolve(conv, x)
    x = stream.window(conv, x)
    if residual is not None:
        residual = stream.delay(conv, residual, max(0, x.shape[2] - 2))
    return convolve(conv, x, gamma, residual, upsample, pad_rows=False)


class CausalConv3d(nn.Conv3d):
    """Convolution in which frame t sees frames t-k+1 .. t only: y[t] = bias + sum_i W[:, :, i] * x[t-k+1+i].

    Frames before the first are zeros; space is padded by `k // 2` zeros on each side. An image is a first frame, so
    only the last temporal slice of the weight meets anything else than zeros, and the result is exactly a
    two-dimensional convolution with W[:, :, -1].

    Args:
        kernel_size: 1, 3, or (temporal, height, width).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        kt, kh, kw = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        super().__init__(in_channels, out_channels, (kt, kh, kw), padding=(0, kh // 2, kw // 2))
        self.history = kt - 1
        self.convolution: Convolution = "auto"

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        if x.ndim == 4:
            return convolve_rows(self, x, stream)
        if self.history > 0:
            needed = self.history + x.shape[2]
            if isinstance(stream, FrameStream):
                x = stream.join(self, x, self.history)
            x = F.pad(x, (0, 0, 0, 0, needed - x.shape[2], 0))
        return super().forward(x)


class ChannelRMSNorm(nn.Module):
    """RMS norm over channels: y = sqrt(C) * x / max(|x|_2, 1e-12) * gamma, |x|_2 over the channels of one position.

    An image: `ops.channel_norm_silu`, rounded once. A video in float16 or bfloat16 rounds as diffusers does: x / |x|_2
    is computed in float32 and rounded, then each of the two products.

    Args:
        dim: number of channels C.
        axes: how many axes follow the channels in the stored shape of `gamma` (`[C, 1, ...]`); no effect on the result.
    """

    silu = False

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses(x):
            return norm_silu(x, self.gamma, silu=self.silu)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        gamma = self.gamma.reshape(-1, *[1] * (x.ndim - 2))
        x = F.normalize(wide, dim=1).to(x.dtype) * self.scale * gamma
        return F.silu(x) if self.silu else x

    def fuses(self, x: Tensor) -> bool:
        """Whether the op takes `x`: an image, where there are kernels, in the type of the parameters."""
        return x.ndim == 4 and has_kernels(x) and x.dtype == self.gamma.dtype


class ChannelRMSNormSiLU(ChannelRMSNorm):
    """SiLU(ChannelRMSNorm(x)): the pair in front of every 3x3x3 convolution but the first."""

    silu = True


def are_one_op(norm: ChannelRMSNormSiLU, conv: CausalConv3d, x: Tensor, *between: nn.Dropout) -> bool:
    """Whether x is an image, nothing of the user's hangs on the two, and what is between them drops nothing."""
    drops = any(d.training and d.p > 0 for d in between)
    return not drops and norm.fuses(x) and type(conv) is CausalConv3d and is_bare(norm, *between, conv)


def norm_and_convolve(norm: ChannelRMSNormSiLU, conv: CausalConv3d, x: Tensor, stream: Stream) -> Tensor:
    """conv(norm(x)), in one op where they are one."""
    return convolve_rows(conv, x, stream, norm.gamma) if are_one_op(norm, conv, x) else conv(norm(x), stream)


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution (padded right and below), then optionally time.

    Time: frames (x[-1], x[0], x[1]), (x[1], x[2], x[3]), ... of the stream go through a (3, 1, 1) convolution, two
    frames to one. The first chunk, which is the first frame, passes unchanged.

    Shapes: [B, C, H, W] -> [B, C, H/2, W/2]; [B, C, T, H, W] -> [B, C, 1 or T/2, H/2, W/2].
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        if isinstance(stream, RowStream):
            x = stream.window(self, x, above=0, step=2)
            if not x.shape[2]:
                return x[..., : x.shape[3] // 2]
        x = per_frame(self.resample, x)
        if not self.temporal or not isinstance(stream, FrameStream):
            return x
        x = stream.join(self, x, keep=1)
        return x if stream.first_chunk else self.time_conv(x)


class Upsample(nn.Module):
    """Optionally double time, then double height and width (nearest neighbour) and halve channels (3x3 convolution).

    Time: a causal (3, 1, 1) convolution to 2C channels, whose halves become frames 2t and 2t+1. The first latent frame
    stands for one image frame only: it passes unchanged, and the convolution never sees it (its history begins with
    zeros at the second latent frame).

    Shapes: [B, C, H, W] -> [B, C/2, 2H, 2W]; [B, C, T, H, W] -> [B, C/2, 1 or 2T, 2H, 2W].
    """

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        if x.ndim == 4:
            return self._enlarge(x, stream)
        if self.temporal and isinstance(stream, FrameStream) and not stream.first_chunk:
            x = self.time_conv(x, stream)
            x = x.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # [B, 2C, T, ...] -> [B, C, 2T, ...]
        return per_frame(self.resample, x)

    def _enlarge(self, x: Tensor, stream: Stream) -> Tensor:
        enlarge, conv = self.resample
        if type(conv) is nn.Conv2d and is_bare(self.resample, enlarge, conv):
            return convolve_rows(conv, x, stream, upsample=True)
        if not isinstance(stream, RowStream):
            return self.resample(x)
        x = stream.window(conv, x)
        if not x.shape[2]:
            return x[:, : x.shape[1] // 2].repeat(1, 1, 1, 2)
        return self.resample(x)[:, :, 2:-2]


class ResidualBlock(nn.Module):
    """y = shortcut(x) + conv2(dropout(SiLU(norm2(conv1(SiLU(norm1(x))))))); shortcut is 1x1x1 where widths differ."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNormSiLU(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3)
        self.norm2 = ChannelRMSNormSiLU(out_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        two = are_one_op(self.norm1, self.conv1, x) and are_one_op(self.norm2, self.conv2, x, self.dropout)
        if two and stream is None:
            gammas = self.norm1.gamma, self.norm2.gamma
            return convolve_twice((self.conv1, self.conv2), gammas, x, self.conv_shortcut(x))
        h, residual = norm_and_convolve(self.norm1, self.conv1, x, stream), self.conv_shortcut(x)
        if are_one_op(self.norm2, self.conv2, h, self.dropout):
            return convolve_rows(self.conv2, h, stream, self.norm2.gamma, residual)
        h = self.conv2(self.dropout(self.norm2(h)), stream)
        if isinstance(stream, RowStream):
            residual = stream.delay(self, residual, h.shape[2])
        return h + residual


class AttentionBlock(nn.Module):
    """x + proj(softmax(q k^T / sqrt(C)) v) over the H*W positions of one frame, one head of width C, q, k, v from
    the RMS norm of x. Frames do not see each other, so there is nothing to remember in `stream`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        return per_frame(self._attend, x)

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)  # [N, 1, H*W, 3C]
        out = wide_attention(*tokens.chunk(3, dim=-1))
        del tokens  # three images of memory, before the projection takes its own
        out = out.squeeze(1).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return x + self.proj(out)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim, dropout) for _ in range(2)])

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        x = self.resnets[0](x, stream)
        x = self.attentions[0](x, stream)
        return self.resnets[1](x, stream)


class UpBlock(nn.Module):
    """One resolution of the decoder: residual blocks, then an `Upsample` unless it is the last one."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, dropout: float, upsample: Upsample | None) -> None:
        super().__init__()
        widths = [in_dim] + [out_dim] * blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b, dropout) for a, b in pairwise(widths))
        self.upsamplers = nn.ModuleList([upsample] if upsample is not None else [])

    def forward(self, x: Tensor, stream: Stream = None) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, stream)
        return x


class Encoder(nn.Module):
    """Pixels to the latent's moments: [B, channels, H, W] -> [B, out_channels, H/2^n, W/2^n], n = len(dim_mult) - 1.

    Args:
        dim: width at full resolution; stage i is `dim * dim_mult[i]` wide.
        out_channels: channels of the result, means and log-variances.
        num_res_blocks: residual blocks per stage.
        attn_scales: resolutions (1 is the input's, then 1/2, 1/4, ...) whose residual blocks are each followed by
            attention.
        temporal: for each downsampling, whether it also halves time.
        channels: channels of the input, 3 or 4.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        attn_scales: Sequence[float],
        temporal: Sequence[bool],
        dropout: float,
        channels: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(channels, dim, 3)
        layers: list[nn.Module] = []
        width = dim
        for stage, mult in enumerate(dim_mult):
            for _ in range(num_res_blocks):
                layers.append(ResidualBlock(width, dim * mult, dropout))
                width = dim * mult
                if 0.5**stage in attn_scales:
                    layers.append(AttentionBlock(width))
            if stage < len(dim_mult) - 1:
                layers.append(Downsample(width, temporal[stage]))
        self.down_blocks = nn.ModuleList(layers)
        self.mid_block = MidBlock(width, dropout)
        self.norm_out = ChannelRMSNormSiLU(width)
        self.conv_out = CausalConv3d(width, out_channels, 3)

    def forward(self, x: Tensor, stream: FrameStream | None = None, strip: int | None = None) -> Tensor:
        """strip: rows of an image computed at a time in front of the middle block, a multiple of 2^n; None: all."""
        if strip is None:
            x = self._shrink(x, stream)
        else:
            scale = 2 ** sum(isinstance(layer, Downsample) for layer in self.down_blocks)
            x = run_in_strips(self._shrink, x, strip, x.shape[2] // scale)
        x = self.mid_block(x, stream)
        return norm_and_convolve(self.norm_out, self.conv_out, x, stream)

    def _shrink(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv_in(x, stream)
        for layer in self.down_blocks:
            x = layer(x, stream)
        return x


class Decoder(nn.Module):
    """Latent to pixels: [B, z_dim, H, W] -> [B, channels, 2^n H, 2^n W], n = len(dim_mult) - 1.

    Args:
        dim: width at full resolution; the stages are `dim * m` wide for m in `dim_mult` reversed.
        z_dim: channels of the latent.
        num_res_blocks: residual blocks per stage, less one.
        temporal: for each upsampling, lowest resolution first, whether it also doubles time.
        channels: channels of the result, 3 or 4.
    """

    def __init__(
        self,
        dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        temporal: Sequence[bool],
        dropout: float,
        channels: int,
    ) -> None:
        super().__init__()
        widths = [dim * mult for mult in reversed(dim_mult)]
        self.conv_in = CausalConv3d(z_dim, widths[0], 3)
        self.mid_block = MidBlock(widths[0], dropout)
        blocks: list[nn.Module] = []
        in_dim = widths[0]
        for stage, width in enumerate(widths):
            upsample = Upsample(width, temporal[stage]) if stage < len(widths) - 1 else None
            blocks.append(UpBlock(in_dim, width, num_res_blocks + 1, dropout, upsample))
            in_dim = width // 2
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = ChannelRMSNormSiLU(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], channels, 3)

    def forward(self, x: Tensor, stream: FrameStream | None = None, strip: int | None = None) -> Tensor:
        """strip: rows of the latent of an image computed at a time behind the middle block; None: all."""
        x = self.conv_in(x, stream)
        x = self.mid_block(x, stream)
        if strip is None:
            return self._enlarge(x, stream)
        height = x.shape[2] * 2 ** (len(self.up_blocks) - 1)
        return run_in_strips(lambda rows, stream: self._enlarge_rows(rows, stream, strip), x, strip, height)

    def _enlarge(self, x: Tensor, stream: Stream) -> Tensor:
        for block in self.up_blocks:
            x = block(x, stream)
        return norm_and_convolve(self.norm_out, self.conv_out, x, stream)

    def _enlarge_rows(self, x: Tensor, stream: RowStream, strip: int, first: int = 0) -> Tensor:
        """`_enlarge` from block `first` on, a strip at a time: `strip` rows, doubled as often as those of `x` were.

        The last strip completes all rows that the layers lag behind, together more than a strip at full resolution.
        """
        if first == len(self.up_blocks):
            return norm_and_convolve(self.norm_out, self.conv_out, x, stream)
        block, last = self.up_blocks[first], stream.last_strip
        out: list[Tensor] = []
        parts = x.split(strip * 2**first, dim=2)
        for i, part in enumerate(parts):
            stream.last_strip = last and i == len(parts) - 1
            out.append(self._enlarge_rows(block(part, stream), stream, strip, first + 1))
        return torch.cat(out, dim=2)
