"""Non-causal attention over joint [text, image] sequences, dense or packed; never a mask over padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_image_fast.ops import _library as lib

_OP = "joint_attention"
# torch 2.5 can choose among backends, but not order them.
_can_order_backends = "set_priority" in inspect.signature(sdpa_kernel).parameters


def joint_attention(q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int] | None = None):
    """softmax(q k^T / sqrt(head_dim)) v for each sample of a packed batch and each head.

    Samples of equal length run as one dense batch, others one after another, so that no padding is computed and no
    sample sees another. The arithmetic is torch's scaled_dot_product_attention; autograd, fake tensors and
    torch.compile come with it (the lengths are Python numbers: a new set of lengths is a new graph). On GPUs from
    Hopper on, passes without gradients prefer cuDNN's kernels to those of FlashAttention-2 (`preferred_backends`).

    Args:
        q: [sum of q_lens, heads, head_dim]; k, v: [sum of k_lens, heads, head_dim]; one dtype.
        q_lens: rows of each sample in q. k_lens: in k and v; None: q_lens.

    Returns:
        [sum of q_lens, heads, head_dim], dtype of q. A sample without queries gives no rows.

    Raises:
        ValueError, TypeError: lengths that do not add up, shapes, dtypes or devices that do not fit together.
    """
    k_lens = q_lens if k_lens is None else k_lens
    _check(q, k, v, q_lens, k_lens)
    if lib.use_reference():
        return joint_attention_reference(q, k, v, q_lens, k_lens)
    if len(set(q_lens)) == 1 and len(set(k_lens)) == 1:
        out = _attend(*(t.unflatten(0, (len(q_lens), -1)) for t in (q, k, v)))
        return out.flatten(0, 1)
    parts = zip(q.split(list(q_lens)), k.split(list(k_lens)), v.split(list(k_lens)))
    return torch.cat([_attend(qi[None], ki[None], vi[None])[0] for qi, ki, vi in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, H, E] -> [B, L, H, E]."""
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and torch.is_grad_enabled() and q.requires_grad:
        # torch's backward of 16-bit attention on the CPU takes six times as long as its float32 one.
        return _sdpa(q.float(), k.float(), v.float()).to(q.dtype)
    backends = preferred_backends(q) if q.numel() else []
    if backends:
        with sdpa_kernel(backends, set_priority=True):
            return _sdpa(q, k, v)
    return _sdpa(q, k, v)


def preferred_backends(q: Tensor) -> list[SDPBackend]:
    """The kernels that torch is asked to try first, in order; empty: torch's own order.

    FlashAttention-2 does not use the instructions of Hopper (sm_90) and later GPUs, cuDNN does. Gradients stay with
    torch's order.
    """
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or not _can_order_backends:
        return []
    if (torch.is_grad_enabled() and q.requires_grad) or torch.cuda.get_device_capability(q.device)[0] < 9:
        return []
    return [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    ]  # fmt: skip


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def joint_attention_reference(q, k, v, q_lens, k_lens=None):
    """The formula in plain PyTorch, in the dtype of q."""
    out = []
    k_lens = q_lens if k_lens is None else k_lens
    for qi, ki, vi in zip(q.split(list(q_lens)), k.split(list(k_lens)), v.split(list(k_lens))):
        scores = torch.einsum("qhe,khe->hqk", qi, ki) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), vi))
    return torch.cat(out)


def _check(q, k, v, q_lens, k_lens) -> None:
    if q.dtype not in lib.DTYPE_CODES:
        lib.fail(_OP, "dtype", "be float32, float16, bfloat16 or float64", q.dtype, TypeError)
    for name, t in (("q", q), ("k", k), ("v", v)):
        lib.check_like(_OP, name, t, q)
        if t.dim() != 3:
            lib.fail(_OP, name, "have three dimensions, [rows, heads, head_dim]", tuple(t.shape))
        if t.shape[1:] != q.shape[1:]:
            lib.fail(_OP, name, f"have the heads and width of q, {tuple(q.shape[1:])}", tuple(t.shape[1:]))
    if not q_lens:
        lib.fail(_OP, "q_lens", "name at least one sample", list(q_lens))
    if len(q_lens) != len(k_lens):
        lib.fail(_OP, "k_lens", f"have {len(q_lens)} samples like q_lens", len(k_lens))
    if sum(q_lens) != q.shape[0]:
        lib.fail(_OP, "q_lens", f"add up to the rows of q, {q.shape[0]}", list(q_lens))
    for name, t in (("k", k), ("v", v)):
        if sum(k_lens) != t.shape[0]:
            lib.fail(_OP, "k_lens", f"add up to the rows of {name}, {t.shape[0]}", list(k_lens))
