"""The VAE of a diffusers pipeline, with single images as a two-dimensional network.

Of a causal convolution, one frame meets the last temporal slice of the weight only; the other slices meet the zeros in
front of the first frame. The layers around convolutions and norms stay diffusers'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen_image_fast.drop_in.swap import Swapped


class FastVAE(Swapped):
    """Mixed into diffusers' AutoencoderKLQwenImage, in front of it."""

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

    _one_frame = False

    def clear_cache(self):
        """Called before each pass: an image needs no memory of the frames before the next one."""
        super().clear_cache()
        if self._one_frame:
            self._feat_map = self._enc_feat_map = None


class FastCausalConv3d(Swapped):
    """Mixed into diffusers' QwenImageCausalConv3d, in front of it."""

    def forward(self, x, cache_x=None):
        left, _, top, _, before, _ = self._padding
        if cache_x is not None or x.shape[2] != 1 or before != self.kernel_size[0] - 1:
            return super().forward(x, cache_x)
        weight, stride, dilation = self.weight[:, :, -1], self.stride[1:], self.dilation[1:]
        return F.conv2d(x.squeeze(2), weight, self.bias, stride, (top, left), dilation, self.groups).unsqueeze(2)


class FastRMSNorm(Swapped):
    """Mixed into diffusers' QwenImageRMS_norm, in front of it: two passes over memory less."""

    def forward(self, x):
        if not self.channel_first or isinstance(self.bias, torch.Tensor) or x.element_size() == 1:
            return super().forward(x)
        wide = x.float() if x.element_size() == 2 else x
        return F.normalize(wide, dim=1).to(x.dtype) * (self.gamma * self.scale)
