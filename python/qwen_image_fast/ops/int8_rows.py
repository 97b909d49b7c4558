"""Rows of activations in 8 bits, each with one scale, rotated so that outliers are spread (ConvRot)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_image_fast.ops import _int8
from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES

_OP = "int8_rows"


def int8_rows(x: Tensor, group: int, gelu: bool = False, float8: bool = False) -> tuple[Tensor, Tensor]:
    """values * scales ~ gelu(x) H: every `group` values times the regular Hadamard matrix H, then rounded.

    H = H4 x H4 x ... is symmetric and its own inverse: products with weights that were rotated likewise are those of x
    (arXiv 2512.03673). In float32, scale = max |r| / 127 over a rotated row r and value = r * (127 / max |r|), to the
    nearest integer. A row whose largest magnitude is below 1e-30 is zero, one that is not finite gets a scale that is
    not. CPUs and GPUs give the same bits.

    In float8 scale = max |r| / 448 and value = r * (448 / max |r|) to the nearest e4m3, ties to even. On a CPU, which
    has no such products, it is computed by PyTorch, GELU by torch's.

    Args:
        x: [rows, width], float32, float16 or bfloat16; its rows contiguous, and with any stride between them.
        group: 1 (no rotation), 4, 16, 64 or 256; divides the width, which is at most 24576 on CUDA.
        gelu: apply GELU in its tanh approximation first.
        float8: float8 e4m3 and not integers.

    Returns:
        values uint8 [rows / 16, width / 64, 16, 64], the numbers plus 128 in the tiles that `linear_int8` reads, on
        CUDA [rows, width]; rows of tiles and the width, to a multiple of 64, are filled up with anything. In float8
        float8_e4m3fn [rows, width], filled up with zeros.
        scales float32 [rows].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; gradients are wanted, of which there are none.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        lib.fail(_OP, "x", "not need gradients: 8-bit layers have none", "a tensor that does")
    if lib.use_reference():
        return int8_rows_reference(x, group, gelu, float8)
    return (_forward if lib.call_directly(x) else _op)(x, group, gelu, float8)


def int8_rows_reference(x: Tensor, group: int, gelu: bool = False, float8: bool = False) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch; without GELU the same bits."""
    x = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    r = _int8.rotated(x, group)
    if float8:
        return _int8.to_float8(r)
    values, scales = _int8.scaled(r, 127)
    return _int8.to_tiles(values.round().nan_to_num(0).to(torch.int8)), scales


def _check(x: Tensor, group: int) -> None:
    lib.check_dtype(_OP, x)
    if x.dtype == torch.float64:
        lib.fail(_OP, "dtype", "be float32, float16 or bfloat16", x.dtype, TypeError)
    if x.dim() != 2 or not x.shape[1]:
        lib.fail(_OP, "x", "have two dimensions, [rows, width], with some width", tuple(x.shape))
    if x.stride(1) != 1 and x.shape[1] > 1:
        lib.fail(_OP, "x", "be contiguous in its last dimension", x.stride())
    _int8.check_group(_OP, group, x.shape[1])
    if x.is_cuda and x.shape[1] > _int8.MOST_WIDTH:
        lib.fail(_OP, "width", f"be at most {_int8.MOST_WIDTH} on CUDA", x.shape[1])
    lib.check_device(_OP, x)


def _forward(x: Tensor, group: int, gelu: bool, float8: bool = False) -> tuple[Tensor, Tensor]:
    values, scales = _fake(x, group, gelu, float8)
    rows, width = x.shape
    if float8 and not lib.on_cuda(x):
        return int8_rows_reference(x, group, gelu, float8)
    if rows:
        lib.launch(
            "int8_rows_fp8" if float8 else _OP, x, x.data_ptr(), x.stride(0), values.data_ptr(), scales.data_ptr(),
            rows, width, group, gelu, DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return values, scales


def _fake(x: Tensor, group: int, gelu: bool, float8: bool = False) -> tuple[Tensor, Tensor]:
    _check(x, group)
    values = (_int8.empty_float8_rows if float8 else _int8.empty_rows)(x.shape[0], x.shape[1], x)
    return values, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


_op = lib.register(_OP, "(Tensor x, int group, bool gelu, bool float8=False) -> (Tensor, Tensor)", _forward, _fake)
