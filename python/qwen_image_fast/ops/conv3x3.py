"""The VAE's 3x3 convolution with norm and SiLU in front and bias and residual behind, by Winograd's algorithm.

Algorithm: F(4x4, 3x3) of Lavin and Gray, arXiv 1509.09308, on points of its own. Tier *reassociated*: algebraically the
same convolution with a quarter of the products, each result a sum in another order.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import _C, DTYPE_CODES, pointer

_OP = "conv3x3"
_PANEL = 32  # kPanel of csrc/kernels/conv3x3.h
_POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)  # those of csrc/kernels/winograd_transform.h; then infinity
# Row 2i + p of a convolution on the doubled image sees three rows of the small one, with these sums of the weight's.
_PHASES = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 0.0)), ((0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    upsample: bool = False,
    pad_rows: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """out = conv(f(x), weight) + bias + residual: 3x3, stride 1, one zero on each side, channels last.

    f(x) = channel_norm_silu(x, gamma) where gamma is given, else x; with `upsample`, then doubled in height and width
    by nearest neighbour, which is never written: each phase of the result is a convolution of the small image.

    Args:
        x: [B, H, W, C], contiguous; float32, float16, bfloat16 or float64.
        weight: [D, C, 3, 3], any strides. bias: [D]. residual: the shape of the result, contiguous. gamma: [C].
            All of the dtype of x; None for none.
        pad_rows: False: the first and last row of x only serve as the neighbours of the others, and give no rows of
            the result, which has the height H - 2, or 2 (H - 2).
        packed: `pack_conv3x3(weight, upsample)` of this weight, made once; None: made for this call.

    Returns:
        [B, H, W, D]; with `upsample` [B, 2H, 2W, D]. Arithmetic in float32 (float64 for float64), one rounding on
        store. float32: the error of a pixel is about twice that of a direct convolution.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    if lib.use_reference():
        return conv3x3_reference(x, weight, bias, residual, gamma, upsample, pad_rows)
    if lib.call_directly(x, weight, bias, residual, gamma):
        return _forward(x, weight, bias, residual, gamma, upsample, pad_rows, packed)
    return _op(x, weight, bias, residual, gamma, upsample, pad_rows, packed)


def conv3x3_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    upsample: bool = False,
    pad_rows: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """The formula in plain PyTorch, in the dtype of x; `packed` is not used."""
    if gamma is not None:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x = F.silu(F.normalize(wide, dim=-1).to(x.dtype) * x.shape[-1] ** 0.5 * gamma)
    x = x.permute(0, 3, 1, 2)
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    out = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)
    if not pad_rows:
        cut = 2 if upsample else 1
        out = out[:, cut:-cut]
    return out if residual is None else out + residual


@functools.cache
def _weight_transform() -> Tensor:
    """G [6, 3]: weights to their values at the points, over the derivative of prod(x - q) there. float64."""
    rows = []
    for p in _POINTS:
        slope = 1.0
        for q in _POINTS:
            slope *= p - q if q != p else 1.0
        rows.append([1 / slope, p / slope, p * p / slope])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


@functools.cache
def _pack_matrices(upsample: bool) -> Tensor:
    """[phases, 36, 9]: flattened 3x3 weights to their transforms G F_p w (G F_q)^T, phase = 2p + q. float64."""
    g = _weight_transform()
    if not upsample:
        return torch.kron(g, g).unsqueeze(0)
    one_axis = [g @ torch.tensor(f, dtype=torch.float64) for f in _PHASES]
    return torch.stack([torch.kron(rows, columns) for rows in one_axis for columns in one_axis])


def pack_conv3x3(weight: Tensor, upsample: bool = False) -> Tensor:
    """The weight as the kernel reads it, four times the size (upsample: 16): [36, phases, panels, C, 32].

    float32, or float64 for a float64 weight. The output channels lie in panels of 32, the last one filled with zeros.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out_channels, in_channels = weight.shape[:2]
    panels = -(-out_channels // _PANEL)
    taps = weight.detach().permute(2, 3, 1, 0).to(dtype)
    taps = F.pad(taps, (0, panels * _PANEL - out_channels)).unflatten(3, (panels, _PANEL)).transpose(2, 3)
    matrices = _pack_matrices(upsample).to(dtype=dtype, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        packed = matrices.flatten(0, 1) @ taps.reshape(9, -1)
    packed = packed.view(len(matrices), 36, panels, in_channels, _PANEL)
    return packed.transpose(0, 1).contiguous()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    upsample: bool,
    pad_rows: bool,
) -> list[int]:
    """Check everything but `packed`; the shape of the result."""
    lib.check_input(_OP, "x", x)
    if x.dim() != 4:
        lib.fail(_OP, "x", "have four dimensions, [batch, height, width, channels]", tuple(x.shape))
    batch, height, width, channels = x.shape
    lib.check_like(_OP, "weight", weight, x)
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3):
        lib.fail(_OP, "weight", f"have the shape [out_channels, {channels}, 3, 3]", tuple(weight.shape))
    if not pad_rows:
        if height < 2:
            lib.fail(_OP, "x", "have at least 2 rows without pad_rows", height)
        height -= 2
    scale = 2 if upsample else 1
    shape = [batch, scale * height, scale * width, weight.shape[0]]
    for name, t, wanted in (("bias", bias, shape[3:]), ("residual", residual, shape), ("gamma", gamma, [channels])):
        if t is None:
            continue
        lib.check_like(_OP, name, t, x)
        if list(t.shape) != wanted:
            lib.fail(_OP, name, f"have the shape {tuple(wanted)}", tuple(t.shape))
        if not t.is_contiguous():
            lib.fail(_OP, name, "be contiguous", f"strides {t.stride()}")
    return shape


def _check_packed(packed: Tensor, x: Tensor, weight: Tensor, upsample: bool) -> None:
    wanted = (36, 4 if upsample else 1, -(-weight.shape[0] // _PANEL), weight.shape[1], _PANEL)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if packed.shape != wanted or packed.dtype != dtype or not packed.is_contiguous() or not packed.is_cpu:
        got = f"{packed.dtype} {tuple(packed.shape)} on {packed.device}"
        lib.fail(_OP, "packed", "be pack_conv3x3(weight, upsample) of this weight", got)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    upsample: bool,
    pad_rows: bool,
    packed: Tensor | None,
) -> Tensor:
    shape = _check(x, weight, bias, residual, gamma, upsample, pad_rows)
    out = x.new_empty(shape)
    if packed is None:
        packed = pack_conv3x3(weight, upsample)
    _check_packed(packed, x, weight, upsample)
    if out.numel():
        _C.conv3x3_forward(
            x.data_ptr(), packed.data_ptr(), pointer(bias), pointer(residual), pointer(gamma), out.data_ptr(),
            *x.shape, weight.shape[0], upsample, pad_rows, DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return out


def _fake(x, weight, bias, residual, gamma, upsample, pad_rows, packed):
    return x.new_empty(_check(x, weight, bias, residual, gamma, upsample, pad_rows))


_op = lib.register(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gamma, bool upsample, bool pad_rows, "
    "Tensor? packed) -> Tensor",
    _forward,
    _fake,
)


def _phase_weights(weight: Tensor) -> Tensor:
    """[D, C, 3, 3] -> [4D, C, 3, 3]: the weights of the four phases on the small image, phase = 2p + q."""
    folds = torch.tensor(_PHASES, dtype=weight.dtype, device=weight.device)
    return torch.einsum("pya,qxb,dcab->pqdcyx", folds, folds, weight).flatten(0, 2)


def _sum_phases(grad: Tensor) -> Tensor:
    """The transpose of `_phase_weights`."""
    folds = torch.tensor(_PHASES, dtype=grad.dtype, device=grad.device)
    return torch.einsum("pya,qxb,pqdcyx->dcab", folds, folds, grad.unflatten(0, (2, 2, -1)))


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, gamma, ctx.upsample, ctx.pad_rows, _ = inputs
    ctx.save_for_backward(x, weight, gamma)
    ctx.has_bias = bias is not None


def _autograd(ctx, grad_out):
    """The gradient of x is the same kind of convolution with the weight turned; that of the weight is torch's."""
    x, weight, gamma = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual, need_gamma = ctx.needs_input_grad[:5]
    grad_out = grad_out.contiguous()
    grads: list[Tensor | None] = [None] * 8
    if need_bias and ctx.has_bias:
        grads[2] = grad_out.sum((0, 1, 2))
    if need_residual:
        grads[3] = grad_out
    if ctx.upsample:
        batch, height, width = (n // s for n, s in zip(grad_out.shape, (1, 2, 2)))
        grad_out = grad_out.view(batch, height, 2, width, 2, -1).permute(0, 1, 3, 2, 4, 5).flatten(3).contiguous()
        weight = _phase_weights(weight)
    if not ctx.pad_rows:
        grad_out = F.pad(grad_out, (0, 0, 0, 0, 1, 1))
    if need_x or need_gamma:
        grad_in = _op(grad_out, weight.flip(2, 3).transpose(0, 1), None, None, None, False, True, None)
        grads[0] = grad_in
    if need_weight:
        y = x if gamma is None else torch.ops.qwen_image_fast.channel_norm_silu(x, gamma, None, True)
        planes = (grad_out.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2))
        options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        grad_weight = torch.ops.aten.convolution_backward(*planes, weight, *options)[1]
        grads[1] = _sum_phases(grad_weight) if ctx.upsample else grad_weight
    if gamma is not None and (need_x or need_gamma):
        grads[0], grads[4], _ = torch.ops.qwen_image_fast.channel_norm_silu_backward(grad_in, x, gamma, None, True)
    return tuple(grads)


lib.register_autograd(_OP, _autograd, _setup_context)
