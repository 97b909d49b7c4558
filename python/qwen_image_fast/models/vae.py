"""The Qwen-Image VAE: images or videos in [-1, 1] to latents at 1/8 of the resolution, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from qwen_image_fast.models.base import PretrainedModel, record_config
from qwen_image_fast.models.outputs import Output
from qwen_image_fast.models.vae_blocks import CausalConv3d, Decoder, Encoder
from qwen_image_fast.models.vae_checks import FRAMES_PER_LATENT, check_latents, check_pixels, check_result, error
from qwen_image_fast.models.vae_conv import Convolution, forget_packed_weights
from qwen_image_fast.models.vae_streams import run_in_chunks
from qwen_image_fast.models.vae_tiling import blended_tiles, check_tiles, strip_rows
from qwen_image_fast.sizes import parse_bytes


class DiagonalGaussianDistribution:
    """Normal distribution with independent elements, from its moments: parameters = [mean, log-variance] on axis 1.

    The log-variance is clamped to [-30, 20]. All attributes have the shape `[B, C, ...]` of the mean.

    Args:
        parameters: `[B, 2C, ...]`.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """mean + std * noise. The noise is drawn on the generator's device; a list has one generator per sample."""
        if not isinstance(generator, list):
            return self.mean + self.std * self._noise(generator, self.mean.shape)
        if len(generator) == 1:
            return self.sample(generator[0])
        if len(generator) != len(self.mean):
            raise ValueError(
                f"DiagonalGaussianDistribution.sample: generator must have one entry per sample ({len(self.mean)}), "
                f"got {len(generator)}"
            )
        noise = torch.cat([self._noise(g, (1, *self.mean.shape[1:])) for g in generator])
        return self.mean + self.std * noise

    def _noise(self, generator: torch.Generator | None, shape: Sequence[int]) -> Tensor:
        device = self.mean.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=self.mean.dtype).to(self.mean.device)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other), `other` being the standard normal by default, summed over all axes but the batch: [B].

        1/2 sum((mean - mean')^2 / var' + var / var' - 1 - logvar + logvar')
        """
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            terms = (self.mean - other.mean) ** 2 / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)


@dataclass
class EncoderOutput(Output):
    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput(Output):
    sample: Tensor


class AutoencoderKLQwenImage(PretrainedModel):
    """Causal video VAE of which an image uses a purely two-dimensional part. Source: Qwen-Image report
    (arXiv:2508.02324, section 2.3); same configuration, state dict and results as `diffusers.AutoencoderKLQwenImage`.

    One frame takes the two-dimensional path: no temporal convolution, and of each causal 3x3x3 weight only the last
    temporal slice, the others meeting zeros (they get zero gradients). More frames go through in chunks, first
    frame 0, then four image frames or one latent frame at a time, each layer remembering its last frames.

    The latents here are raw. The diffusion model works on `(z - latents_mean) / latents_std`, per channel.

    Args:
        base_dim: width at full resolution; stage i is `base_dim * dim_mult[i]` wide.
        z_dim: latent channels.
        dim_mult: one entry per resolution.
        num_res_blocks: residual blocks per stage; the decoder has one more.
        attn_scales: encoder resolutions (1, 1/2, 1/4, ...) with attention in addition to that of the middle block.
        temperal_downsample: for each of the `len(dim_mult) - 1` downsamplings, whether it also halves time.
        dropout: inside residual blocks, in training mode.
        input_channels: 3 (RGB), or 4 (RGBA, as in Qwen-Image-Layered).
        latents_mean, latents_std: `z_dim` numbers each, only recorded in `config`.
    """

    part = "vae"
    # The processes that share tiles (parallel/ranks.py); None: this one computes all.
    ranks: Any = None
    _each = property(lambda self: map if self.ranks is None else self.ranks.each)

    @record_config
    def __init__(
        self,
        base_dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
        input_channels: int = 3,
        latents_mean: Sequence[float] = (
            *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
            *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        ),
        latents_std: Sequence[float] = (
            *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
            *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
        ),
    ) -> None:
        super().__init__()
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise ValueError(
                "AutoencoderKLQwenImage: temperal_downsample must have one entry per downsampling "
                f"({len(dim_mult) - 1} for {len(dim_mult)} entries of dim_mult), got {len(temperal_downsample)}"
            )
        self.z_dim = z_dim
        self.input_channels = input_channels
        self.temperal_downsample = list(temperal_downsample)
        self.temperal_upsample = self.temperal_downsample[::-1]
        self.spatial_compression_ratio = 2 ** len(temperal_downsample)

        self.encoder = Encoder(
            base_dim, 2 * z_dim, dim_mult, num_res_blocks, attn_scales, temperal_downsample, dropout, input_channels
        )
        self.quant_conv = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(
            base_dim, z_dim, dim_mult, num_res_blocks, self.temperal_upsample, dropout, input_channels
        )

        self.use_slicing = False
        self.use_tiling = False
        self.memory_limit: int | None = None
        # In pixels. Larger images than one tile are split while `use_tiling` is set.
        self.tile_sample_min_height = 256
        self.tile_sample_min_width = 256
        self.tile_sample_stride_height = 192
        self.tile_sample_stride_width = 192

    @classmethod
    def config_of_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The released configuration, in the width and channels of a file."""
        shape = shapes.get("encoder.conv_in.weight", ())
        if len(shape) != 5:
            raise ValueError(f"from_single_file: the file lacks encoder.conv_in.weight of 5 axes, got {list(shape)}")
        return {"base_dim": shape[0], "input_channels": shape[1]}

    def enable_slicing(self) -> None:
        """Encode and decode batches one sample at a time: less memory, same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encode and decode what is larger than one tile in overlapping tiles, blended linearly where they overlap.

        Less memory, but not the same result: each tile has its own attention and zero padding, and decoded pixels are
        not clamped to [-1, 1].

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile in pixels. None keeps the current one.
            tile_sample_stride_height, tile_sample_stride_width: distance between the starts of neighbouring tiles in
                pixels, at most the size of a tile. None keeps the current one.

        Raises:
            ValueError: a number that is no positive multiple of `spatial_compression_ratio`, or tiles with gaps.
        """
        given = {
            "tile_sample_min_height": tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width,
            "tile_sample_stride_height": tile_sample_stride_height,
            "tile_sample_stride_width": tile_sample_stride_width,
        }
        sizes: dict[str, int] = {name: getattr(self, name) if size is None else size for name, size in given.items()}
        check_tiles(sizes, self.spatial_compression_ratio)
        for name, size in sizes.items():
            setattr(self, name, size)
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def set_memory_limit(self, limit: int | str | None) -> None:
        """Compute images in strips of rows, as high as fit into so much memory: the same result, for any size.

        Unlike tiles, strips are exact: attention, at latent size, sees the whole image, and a convolution keeps the
        rows that it needs of the strip before. A video is not computed in strips: under a limit it is an error.

        Args:
            limit: bytes that encoding or decoding one image may take, or a string like "4GB"; without the parameters
                and their transformed copies (`docs/vae.md`). None: no limit.

        Raises:
            ValueError: not a number of bytes.
        """
        self.memory_limit = None if limit is None else self._limit("set_memory_limit", limit)

    def set_convolution(self, convolution: Convolution) -> None:
        """How 3x3 convolutions of an image are computed on a CPU.

        Args:
            convolution: "auto" (the default): by Winograd's algorithm where it is faster, algebraically equal with
                about twice the rounding error. "exact": directly, everywhere.

        Raises:
            ValueError: another word.
        """
        if convolution not in get_args(Convolution):
            raise error("set_convolution", f"convolution must be 'auto' or 'exact', got {convolution!r}")
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, CausalConv3d)):
                module.convolution = convolution
        if convolution == "exact":
            forget_packed_weights(self)

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussianDistribution]:
        """Distribution of the latents of an image or a video.

        Args:
            x: `[B, input_channels, T, H, W]` in [-1, 1], T = 1 (image) or 1 + 4k, H and W multiples of 8, in the
                model's dtype.
            return_dict: return an object with the field `latent_dist` instead of a tuple of one.

        Returns:
            `latent_dist` of shape `[B, z_dim, 1 + k, H / 8, W / 8]`.

        Raises:
            ValueError: an argument that breaks these rules, or latents that are not finite (not with gradients).
        """
        check_pixels("encode", x, self.input_channels, self.spatial_compression_ratio)
        moments = self._per_sample(self._encode, x)
        check_result("encode", "the latents are", moments, self)
        latent_dist = DiagonalGaussianDistribution(moments)
        return EncoderOutput(latent_dist) if return_dict else (latent_dist,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Image or video of raw latents.

        Args:
            z: `[B, z_dim, T, H, W]`, T at least 1, in the model's dtype.
            return_dict: return an object with the field `sample` instead of a tuple of one.

        Returns:
            `sample` of shape `[B, input_channels, 1 + 4 (T - 1), 8 H, 8 W]`, clamped to [-1, 1] unless blended.

        Raises:
            ValueError: an argument that breaks these rules, or pixels that are not finite (not with gradients).
        """
        check_latents("decode", z, self.z_dim)
        sample = self._per_sample(self._decode, z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode `sample`, then decode the mode of its latents, or a random draw if `sample_posterior` is set."""
        latent_dist = self.encode(sample)[0]
        z = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return self.decode(z, return_dict=return_dict)

    def _per_sample(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if (self.use_slicing or self.memory_limit is not None) and x.shape[0] > 1:
            return torch.cat([fn(part) for part in x.split(1)])
        return fn(x)

    def _encode(self, x: Tensor) -> Tensor:
        tile, _ = self._tile_and_stride()
        if self.use_tiling and (x.shape[-2] > tile[0] or x.shape[-1] > tile[1]):
            return self._encode_tiles(x)
        return self._encode_whole(x)

    def tiled_encode(self, x: Tensor) -> Tensor:
        """The moments `[B, 2 z_dim, 1 + k, H / 8, W / 8]` that `encode` makes in tiles, also where tiling is off."""
        check_pixels("tiled_encode", x, self.input_channels, self.spatial_compression_ratio)
        return self._encode_tiles(x)

    def _encode_tiles(self, x: Tensor) -> Tensor:
        tiles = (*self._tile_and_stride(), (1, self.spatial_compression_ratio), self._each)
        return blended_tiles(self._encode_whole, x, *tiles)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """What `decode` makes in tiles, also where tiling is off."""
        check_latents("tiled_decode", z, self.z_dim)
        sample = self._decode_tiles(z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def _decode_tiles(self, z: Tensor) -> Tensor:
        ratio = self.spatial_compression_ratio
        tile, stride = ([size // ratio for size in sizes] for sizes in self._tile_and_stride())
        return blended_tiles(self._decode_whole, z, tile, stride, (ratio, 1), self._each)

    def _encode_whole(self, x: Tensor) -> Tensor:
        if x.shape[2] == 1:
            height, width = (n // self.spatial_compression_ratio for n in x.shape[3:])
            strip = self._strip("encode", x, height, width)
            pixels = None if strip is None else strip * self.spatial_compression_ratio
            return self.quant_conv(self.encoder(_image(x), strip=pixels)).contiguous().unsqueeze(2)
        self._refuse_video("encode", x)
        chunks = (x[:, :, :1], *x[:, :, 1:].split(FRAMES_PER_LATENT, dim=2))
        return self.quant_conv(run_in_chunks(self.encoder, chunks))

    def _decode(self, z: Tensor) -> Tensor:
        tile = [size // self.spatial_compression_ratio for size in self._tile_and_stride()[0]]
        if self.use_tiling and (z.shape[-2] > tile[0] or z.shape[-1] > tile[1]):
            return self._decode_tiles(z)
        return self._decode_whole(z).clamp(-1.0, 1.0)

    def _decode_whole(self, z: Tensor) -> Tensor:
        if z.shape[2] == 1:
            strip = self._strip("decode", z, *z.shape[3:])
            sample = self.decoder(self.post_quant_conv(_image(z)), strip=strip).contiguous().unsqueeze(2)
        else:
            self._refuse_video("decode", z)
            sample = run_in_chunks(self.decoder, self.post_quant_conv(z).split(1, dim=2))
        check_result("decode", "the pixels are", sample, self)
        return sample

    def _strip(self, method: str, x: Tensor, height: int, width: int) -> int | None:
        """Rows of the latent per strip under the memory limit; None: all."""
        if self.memory_limit is None:
            return None
        try:
            rows = strip_rows(self.config, height, width, x.element_size(), self.memory_limit)
        except ValueError as wrong:
            raise error(method, str(wrong)) from None
        if rows is not None and method == "encode" and self.config.attn_scales:
            raise error(method, "memory_limit must be None for an encoder with attn_scales, or fit the whole image")
        return rows

    def _refuse_video(self, method: str, x: Tensor) -> None:
        if self.memory_limit is not None:
            raise error(
                method,
                f"memory_limit must be None for a video, got {x.shape[2]} frames: only images are computed in strips, "
                "enable_tiling() makes a video smaller",
            )

    def _limit(self, method: str, limit: int | str) -> int:
        try:
            return parse_bytes(limit)
        except ValueError as wrong:
            raise error(method, str(wrong)) from None

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "ranks"}  # a copy computes alone

    def _tile_and_stride(self) -> tuple[tuple[int, int], tuple[int, int]]:
        tile = (self.tile_sample_min_height, self.tile_sample_min_width)
        return tile, (self.tile_sample_stride_height, self.tile_sample_stride_width)


def _image(x: Tensor) -> Tensor:
    """The only frame of `x [B, C, 1, H, W]` as `[B, C, H, W]`, in channels-last memory."""
    return x.squeeze(2).contiguous(memory_format=torch.channels_last)
