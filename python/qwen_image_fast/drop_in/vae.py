"""The VAE of a diffusers pipeline, with single images as a two-dimensional network.

Of a causal convolution, one frame meets the last temporal slice of the weight only; the other slices meet the zeros in
front of the first frame. Norm, SiLU, convolution and the residual sum are then one op (`models/vae_conv.py`), and an
upsampling convolution reads the small image. What is around these layers stays diffusers'.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen_image_fast.drop_in.swapped import Swapped
from qwen_image_fast.models.hooks import is_bare
from qwen_image_fast.models.vae import DecoderOutput
from qwen_image_fast.models.vae_conv import convolve, convolve_twice, norm_silu
from qwen_image_fast.models.vae_tiling import blended_tiles
from qwen_image_fast.ops import has_kernels


class FastVAE(Swapped):
    """Mixed into diffusers' AutoencoderKLQwenImage or AutoencoderKLQwenImage21, in front of it."""

    def _encode(self, x):
        return self._for_frames(x, super()._encode).contiguous()

    def _decode(self, z, return_dict=True):
        output = self._for_frames(z, super()._decode)
        output.sample = output.sample.contiguous()
        return output if return_dict else (output.sample,)

    def _for_frames(self, x, run):
        if x.shape[2] != 1:
            return run(x)
        self._one_frame = True
        try:
            return run(x.contiguous(memory_format=torch.channels_last_3d))
        finally:
            self._one_frame = False

    def tiled_decode(self, z, return_dict=True):
        if self.ranks is None or z.shape[2] != 1:
            return super().tiled_decode(z, return_dict)

        def decode(tile):
            self.clear_cache()
            self._conv_idx = [0]
            return self.decoder(self.post_quant_conv(tile), feat_cache=self._feat_map, feat_idx=self._conv_idx)

        sample = self._shared_tiles(decode, z, self.spatial_compression_ratio, 1)
        return DecoderOutput(sample) if return_dict else (sample,)

    def tiled_encode(self, x):
        if self.ranks is None or x.shape[2] != 1:
            return super().tiled_encode(x)

        def encode(tile):
            self.clear_cache()
            self._enc_conv_idx = [0]
            return self.quant_conv(self.encoder(tile, feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))

        return self._shared_tiles(encode, x, 1, self.spatial_compression_ratio)

    def _shared_tiles(self, fn, x, up, down):
        """`fn` of the tiles of an image, which the ranks share; it makes `up / down` positions of one."""
        sides = (self.tile_sample_min_height, self.tile_sample_min_width)
        strides = (self.tile_sample_stride_height, self.tile_sample_stride_width)
        tile, stride = ([side // up for side in pair] for pair in (sides, strides))
        found = blended_tiles(fn, x, tile, stride, (up, down), self.ranks.each)
        self.clear_cache()
        return found

    _one_frame = False
    # The processes that share tiles (parallel/ranks.py); None: diffusers' own loop over them.
    ranks = None

    def clear_cache(self):
        """Called before each pass: an image needs no memory of the frames before the next one."""
        super().clear_cache()
        if self._one_frame:
            self._feat_map = self._enc_feat_map = None


class FastCausalConv3d(Swapped):
    """Mixed into diffusers' QwenImageCausalConv3d, in front of it."""

    convolution = "auto"

    def forward(self, x, cache_x=None):
        if cache_x is not None or x.shape[2] != 1 or not self.keeps_size():
            return super().forward(x, cache_x)
        return convolve(self, x.squeeze(2)).unsqueeze(2)

    def keeps_size(self):
        """Whether it is what `convolve` computes: kernels of 3 or 1, zeros all around, in time only in front.

        That of Qwen-Image-2.1 has no axis of time.
        """
        *time, height, width = self.kernel_size
        padding = (width // 2, width // 2, height // 2, height // 2, *(n for k in time for n in (k - 1, 0)))
        return (
            set(self.kernel_size) in ({3}, {1})
            and self._padding == padding
            and set(self.stride) == set(self.dilation) == {1}
            and self.groups == 1
        )


class FastRMSNorm(Swapped):
    """Mixed into diffusers' QwenImageRMS_norm, in front of it."""

    def forward(self, x):
        if not self.takes(x):
            return super().forward(x)
        frames = x.shape[2] if x.ndim == 5 else None
        y = norm_silu(x if frames is None else x.squeeze(2), self.gamma, silu=False)
        return y if frames is None else y.unsqueeze(2)

    def takes(self, x):
        bare = self.channel_first and not isinstance(self.bias, torch.Tensor) and self.gamma.dtype == x.dtype
        return bare and has_kernels(x) and x.element_size() > 1 and (x.ndim == 4 or (x.ndim == 5 and x.shape[2] == 1))


class FastResidualBlock(Swapped):
    """Mixed into diffusers' QwenImageResidualBlock, in front of it."""

    def forward(self, x, feat_cache=None, feat_idx=(0,)):
        if feat_cache is not None or x.shape[2] != 1 or not self._is_known(x):
            return super().forward(x, feat_cache, feat_idx)
        gammas, residual = (self.norm1.gamma, self.norm2.gamma), self.conv_shortcut(x).squeeze(2)
        return convolve_twice((self.conv1, self.conv2), gammas, x.squeeze(2), residual).unsqueeze(2)

    def _is_known(self, x):
        norms, convs = (self.norm1, self.norm2), (self.conv1, self.conv2)
        return (
            all(isinstance(norm, FastRMSNorm) and norm.takes(x) for norm in norms)
            and all(isinstance(conv, FastCausalConv3d) and conv.keeps_size() for conv in convs)
            and isinstance(self.nonlinearity, nn.SiLU)
            and not (self.dropout.training and self.dropout.p > 0)
            and is_bare(*norms, *convs, self.nonlinearity, self.dropout)
        )


class FastResample(Swapped):
    """Mixed into diffusers' QwenImageResample, in front of it."""

    convolution = "auto"

    def forward(self, x, feat_cache=None, feat_idx=(0,)):
        known = feat_cache is None and x.shape[2] == 1 and self.mode.startswith("upsample")
        if not known or self.convolution == "exact" or not self._is_known():
            return super().forward(x, feat_cache, feat_idx)
        return convolve(self.resample[1], x.squeeze(2), upsample=True).unsqueeze(2)

    def _is_known(self):
        enlarge, conv = self.resample
        return type(conv) is nn.Conv2d and conv.padding == (1, 1) and is_bare(self.resample, enlarge, conv)
