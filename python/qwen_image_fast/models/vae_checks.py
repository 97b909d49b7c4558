"""What the VAE says about inputs that it cannot have been meant to get."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from qwen_image_fast.models.finite import cause

# After the first frame, four image frames go with one latent frame.
FRAMES_PER_LATENT = 4
# Pixels in [-1, 1] may overshoot a little after resizing; a picture in [0, 255] goes far beyond this.
LARGEST_PIXEL = 8.0
# Eight-bit pixels in [-1, 1] are odd multiples of 1/255: the smallest is nearer to zero only where black is zero.
BLACK = 0.9 / 255


def error(method: str, message: str) -> ValueError:
    return ValueError(f"AutoencoderKLQwenImage.{method}: {message}")


def _range(x: Tensor) -> tuple[float, float] | None:
    """Smallest and largest value; None where they cannot be read: while tracing or capturing, and of nothing."""
    if torch.compiler.is_compiling() or x.is_meta or x.numel() == 0 or type(x) is not Tensor:
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    low, high = (v.item() for v in torch.aminmax(x.detach()))
    return low, high


def _check(method: str, name: str, x: Tensor, channels: int) -> None:
    """Shape and type of what is encoded or decoded."""
    if x.ndim != 5:
        hint = f": give one image its frame axis with {name}.unsqueeze(2)" if x.ndim == 4 else ""
        raise error(method, f"{name} must have 5 dimensions [B, C, T, H, W], got {x.ndim}{hint}")
    if not x.is_floating_point():
        hint = "" if name == "z" else ": convert pixels to floats in [-1, 1]"
        raise error(method, f"{name} must have a floating-point dtype, got {x.dtype}{hint}")
    if x.shape[1] != channels:
        raise error(method, f"{name} must have {channels} channels, got {x.shape[1]}")


def check_pixels(method: str, x: Tensor, channels: int, ratio: int) -> None:
    """Images or videos of sides that `ratio` divides, of finite values that may be pixels in [-1, 1].

    Raises:
        ValueError: another shape or type, NaN, infinity, or values as of [0, 255].

    Warns:
        UserWarning: no negative value, but black, as of [0, 1].
    """
    _check(method, "x", x, channels)
    frames, height, width = x.shape[2:]
    if height % ratio != 0 or width % ratio != 0:
        raise error(method, f"x must have a height and width that are multiples of {ratio}, got {height} and {width}")
    if frames % FRAMES_PER_LATENT != 1:
        raise error(method, f"x must have 1 + {FRAMES_PER_LATENT}k frames, got {frames}")
    found = _range(x)
    if found is None:
        return
    low, high = found
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise error(method, f"x must be finite, got values from {low:g} to {high:g}")
    if max(-low, high) > LARGEST_PIXEL:
        raise error(
            method, f"x must lie in [-1, 1], got values from {low:g} to {high:g}: convert 0..255 with x / 127.5 - 1"
        )
    if 0 <= low < BLACK and low < high <= 1:
        warnings.warn(
            f"AutoencoderKLQwenImage.{method}: x must lie in [-1, 1], got no negative value ({low:g} to {high:g}); "
            "if these pixels are meant to be in [0, 1], convert them with 2 * x - 1",
            stacklevel=3,
        )


def check_latents(method: str, z: Tensor, channels: int) -> None:
    """Finite values, of at least one frame.

    Raises:
        ValueError: another shape or type, NaN or infinity.
    """
    _check(method, "z", z, channels)
    if z.shape[2] == 0:
        raise error(method, "z must have at least one frame, got 0")
    found = _range(z)
    if found is not None and not (abs(found[0]) < float("inf") and abs(found[1]) < float("inf")):
        raise error(method, f"z must be finite, got values from {found[0]:g} to {found[1]:g}")


def check_result(method: str, what: str, x: Tensor, vae: nn.Module) -> None:
    """Finite values of what the VAE made: a clamp would make white of infinity, and bytes make black of NaN.

    Not looked at while gradients flow: in training the loss tells.

    Raises:
        ValueError: NaN or infinity, with their cause.
    """
    found = None if x.requires_grad else _range(x)
    if found is not None and not (abs(found[0]) < float("inf") and abs(found[1]) < float("inf")):
        raise error(method, f"{what} not finite{cause({'the VAE': vae}, x.dtype)}")
