"""True classifier-free guidance with per-token norm rescale, and the Euler step of flow matching."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES, pointer

_OP = "guided_step"


def guided_step(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    dt: Tensor,
    guidance: float = 1.0,
    rescale: bool = True,
    offsets: Tensor | None = None,
) -> Tensor:
    """out = sample + dt * v, with v = uncond + guidance * (cond - uncond), scaled to the norm of cond per token.

    The norms are over the last dimension (a packed latent token); without `uncond` v is `cond`. A token whose combined
    v is exactly zero stays zero.

    Args:
        sample, cond, uncond: [..., channels], contiguous, one dtype; uncond may be None.
        dt: float32 [segments], sigma_next - sigma of each segment of rows.
        guidance: the true CFG scale. rescale: whether v gets the norm of cond.
        offsets: int32 [segments + 1], first row of each segment; None: segments of equal length.

    Returns:
        [..., channels], dtype of sample. Arithmetic in float32 (float64 for float64), one rounding on store.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    if lib.use_reference():
        return guided_step_reference(sample, cond, uncond, dt, guidance, rescale, offsets)
    if lib.call_directly(sample, cond, uncond):
        return _forward(sample, cond, uncond, dt, guidance, rescale, offsets)
    return _op(sample, cond, uncond, dt, guidance, rescale, offsets)


def guided_step_reference(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    dt: Tensor,
    guidance: float = 1.0,
    rescale: bool = True,
    offsets: Tensor | None = None,
) -> Tensor:
    """The formula in plain PyTorch, in the dtype of sample."""
    v = cond
    if uncond is not None:
        v = uncond + guidance * (cond - uncond)
        if rescale:
            norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
            ratio = torch.linalg.vector_norm(cond, dim=-1, keepdim=True) / norm
            v = v * torch.where(norm > 0, ratio, torch.ones_like(ratio))
    rows = sample.numel() // max(sample.shape[-1], 1)
    dt = lib.segment_rows(offsets, dt.shape[0], rows, dt[:, None]).view(*sample.shape[:-1], 1)
    return sample + dt.to(sample.dtype) * v


def _check(sample, cond, uncond, dt, offsets) -> None:
    lib.check_input(_OP, "sample", sample)
    lib.check_same(_OP, "cond", cond, sample, "sample")
    if uncond is not None:
        lib.check_same(_OP, "uncond", uncond, sample, "sample")
    if dt.dtype != torch.float32:
        lib.fail(_OP, "dt", "be float32", dt.dtype)
    if dt.dim() != 1 or not dt.is_contiguous():
        lib.fail(_OP, "dt", "be one contiguous row, [segments]", tuple(dt.shape))
    if dt.get_device() != sample.get_device() or dt.is_cpu != sample.is_cpu:
        lib.fail(_OP, "dt", f"be on the device of sample, {sample.device}", dt.device)
    lib.check_offsets(_OP, sample, offsets, dt.shape[0])


def _forward(sample, cond, uncond, dt, guidance: float, rescale: bool, offsets) -> Tensor:
    _check(sample, cond, uncond, dt, offsets)
    out = torch.empty_like(sample)
    if sample.numel():
        channels = sample.shape[-1]
        lib.launch(
            "guided_step_forward", sample,
            sample.data_ptr(), cond.data_ptr(), pointer(uncond), dt.data_ptr(), pointer(offsets), out.data_ptr(),
            sample.numel() // channels, channels, dt.shape[0], guidance, rescale, DTYPE_CODES[sample.dtype],
        )  # fmt: skip
    return out


def _fake(sample, cond, uncond, dt, guidance, rescale, offsets):
    _check(sample, cond, uncond, dt, offsets)
    return torch.empty_like(sample)


def _backward(grad_out, cond, uncond, dt, guidance: float, rescale: bool, offsets):
    grad_out = grad_out.contiguous()
    grad_cond, grad_uncond = _backward_fake(grad_out, cond, uncond, dt, guidance, rescale, offsets)
    if cond.numel():
        channels = cond.shape[-1]
        lib.launch(
            "guided_step_backward", cond,
            cond.data_ptr(), pointer(uncond), dt.data_ptr(), pointer(offsets), grad_out.data_ptr(),
            grad_cond.data_ptr(), grad_uncond.data_ptr(), cond.numel() // channels, channels, dt.shape[0], guidance,
            rescale, DTYPE_CODES[cond.dtype],
        )  # fmt: skip
    return grad_cond, grad_uncond


def _backward_fake(grad_out, cond, uncond, dt, guidance, rescale, offsets):
    return torch.empty_like(cond), cond.new_empty(0) if uncond is None else torch.empty_like(uncond)


_op = lib.register(
    _OP,
    "(Tensor sample, Tensor cond, Tensor? uncond, Tensor dt, float guidance, bool rescale, Tensor? offsets) -> Tensor",
    _forward,
    _fake,
)
_backward_op = lib.register(
    f"{_OP}_backward",
    "(Tensor grad_out, Tensor cond, Tensor? uncond, Tensor dt, float guidance, bool rescale, Tensor? offsets)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    _, cond, uncond, dt, ctx.guidance, ctx.rescale, offsets = inputs
    ctx.save_for_backward(cond, uncond, dt, offsets)


def _autograd(ctx, grad_out):
    cond, uncond, dt, offsets = ctx.saved_tensors
    grad_cond, grad_uncond = _backward_op(grad_out, cond, uncond, dt, ctx.guidance, ctx.rescale, offsets)
    return grad_out, grad_cond, None if uncond is None else grad_uncond, None, None, None, None


lib.register_autograd(_OP, _autograd, _setup_context)
