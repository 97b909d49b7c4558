"""A convolution of stride 1 with bias and residual behind it, channels last: in one CUDA kernel, or torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import _C, DTYPE_CODES, pointer

_OP = "conv2d"
KERNELS = ("auto", "torch", "cutlass")
# (channels in, channels out, height of the kernel) whose convolution "auto" gives to the CUTLASS kernel on CUDA, as
# `python -m benchmarks.gpu_bench vae` measures them against cuDNN. Nothing has been measured yet (docs/gpu-status.md).
FASTER_THAN_CUDNN: frozenset[tuple[int, int, int]] = frozenset()


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    padding: tuple[int, int] = (1, 1),
    kernel: str = "auto",
) -> Tensor:
    """out = conv(x, weight) + bias + residual: stride 1, `padding` zeros above, below and left, right; channels last.

    Args:
        x: [B, H, W, C], contiguous; float32, float16, bfloat16 or float64.
        weight: [D, C, kh, kw], any strides; best where it lies as [D, kh, kw, C]. bias: [D]. residual: the shape of
            the result, contiguous. All of the dtype of x; None for none.
        kernel: "torch": torch's convolution, cuDNN's on CUDA, then the sum. "cutlass": one CUDA kernel, which rounds
            once, behind the sum; float16 and bfloat16, C and D multiples of 8, aligned to 16 bytes. "auto": by the
            table `FASTER_THAN_CUDNN`.

    Returns:
        [B, H + 2 padding - kh + 1, W + 2 padding - kw + 1, D].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together, or tensors that the chosen kernel
            cannot take.
    """
    if lib.use_reference():
        return conv2d_reference(x, weight, bias, residual, padding)
    if lib.call_directly(x, weight, bias, residual):
        return _forward(x, weight, bias, residual, padding, kernel)
    return _op(x, weight, bias, residual, padding, kernel)


def adds_in_its_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether "auto" gives this convolution to the kernel that adds bias and residual to its sums."""
    return (*weight.shape[1::-1], weight.shape[2]) in FASTER_THAN_CUDNN and obstacle(x, weight, ()) is None


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    padding: tuple[int, int] = (1, 1),
    kernel: str = "auto",
) -> Tensor:
    """The formula in plain PyTorch, in the dtype of x; `kernel` is not used."""
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=tuple(padding)).permute(0, 2, 3, 1)
    return (out if residual is None else out + residual).contiguous()


def _check(x, weight, bias, residual, padding, kernel) -> list[int]:
    """The shape of the result."""
    lib.check_dtype(_OP, x)
    if x.dim() != 4:
        lib.fail(_OP, "x", "have four dimensions, [batch, height, width, channels]", tuple(x.shape))
    if not x.is_contiguous():
        lib.fail(_OP, "x", "be contiguous", f"strides {x.stride()}")
    lib.check_like(_OP, "weight", weight, x)
    if weight.dim() != 4 or weight.shape[1] != x.shape[3]:
        lib.fail(_OP, "weight", f"have the shape [out_channels, {x.shape[3]}, height, width]", tuple(weight.shape))
    if kernel not in KERNELS:
        lib.fail(_OP, "kernel", f"be one of {', '.join(KERNELS)}", repr(kernel))
    batch, height, width, _ = x.shape
    out_height, out_width = (
        n + 2 * pad - k + 1 for n, pad, k in zip((height, width), padding, weight.shape[2:], strict=True)
    )
    if out_height < 0 or out_width < 0:
        lib.fail(_OP, "x", f"be at least as large as the weight less the padding {tuple(padding)}", tuple(x.shape))
    shape = [batch, out_height, out_width, weight.shape[0]]
    for name, t, wanted in (("bias", bias, shape[3:]), ("residual", residual, shape)):
        if t is None:
            continue
        lib.check_like(_OP, name, t, x)
        if list(t.shape) != wanted:
            lib.fail(_OP, name, f"have the shape {tuple(wanted)}", tuple(t.shape))
        if not t.is_contiguous():
            lib.fail(_OP, name, "be contiguous", f"strides {t.stride()}")
    return shape


def obstacle(x: Tensor, weight: Tensor, shape: Sequence[int]) -> tuple[str, str, object] | None:
    """What keeps the CUTLASS kernel from a result of `shape`: an argument, a rule and a value."""
    if not (x.is_cuda and hasattr(_C, "conv2d_forward_cuda")):
        return "x", "be on CUDA, in a build with CUTLASS's kernels, for kernel='cutlass'", x.device
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "dtype", "be float16 or bfloat16 for kernel='cutlass'", x.dtype
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return "weight", "have multiples of 8 channels for kernel='cutlass'", tuple(weight.shape)
    if x.numel() >= 2**31 or x.data_ptr() % 16:
        return "x", "have fewer than 2^31 elements, aligned to 16 bytes, for kernel='cutlass'", tuple(x.shape)
    if math.prod(shape) >= 2**31:
        return "x", "give a result of fewer than 2^31 elements for kernel='cutlass'", tuple(x.shape)
    return None


def _uses_cutlass(x: Tensor, weight: Tensor, shape: Sequence[int], kernel: str) -> bool:
    if kernel == "torch" or (kernel == "auto" and (*weight.shape[1::-1], weight.shape[2]) not in FASTER_THAN_CUDNN):
        return False
    found = obstacle(x, weight, shape)
    if found and kernel == "cutlass":
        lib.fail(_OP, *found)
    return found is None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, padding: tuple[int, int], kernel: str
) -> Tensor:
    shape = _check(x, weight, bias, residual, padding, kernel)
    if 0 in shape:
        return x.new_empty(shape)
    if not _uses_cutlass(x, weight, shape, kernel):
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=tuple(padding)).permute(0, 2, 3, 1).contiguous()
        return out if residual is None else out.add_(residual)
    out = x.new_empty(shape)
    # As the kernel reads them; no copy of what lies so already.
    taps = weight.permute(0, 2, 3, 1).contiguous()
    residual, bias = (None if t is None else t if t.data_ptr() % 16 == 0 else t.clone() for t in (residual, bias))
    lib.launch(
        f"{_OP}_forward", x, x.data_ptr(), taps.data_ptr(), pointer(bias), pointer(residual), out.data_ptr(),
        *x.shape, weight.shape[0], *weight.shape[2:], *padding, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def _fake(x, weight, bias, residual, padding, kernel):
    return x.new_empty(_check(x, weight, bias, residual, padding, kernel))


_op = lib.register(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] padding, str kernel) -> Tensor",
    _forward,
    _fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.padding, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _autograd(ctx, grad_out):
    """torch's, on every device."""
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    grad_out = grad_out.contiguous()
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_out.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [weight.shape[0]], [1, 1], list(ctx.padding),
        [1, 1], False, [0, 0], 1, [need_x, need_weight, need_bias and ctx.has_bias],
    )  # fmt: skip
    grad_x = grad_x.permute(0, 2, 3, 1) if need_x else None
    return grad_x, grad_weight, grad_bias, grad_out if need_residual else None, None, None


lib.register_autograd(_OP, _autograd, _setup_context)
