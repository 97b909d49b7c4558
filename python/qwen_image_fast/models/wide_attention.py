"""Attention with one head that is wider than fused kernels take: the VAE's, of 384 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 256  # of the heads that FlashAttention and cuDNN compute
SCORES = 1 << 26  # of a chunk, in float32 a quarter of a GB
# torch 2.8; before, products of 16 bits came in 16 bits.
_has_wide_products = "out_dtype" in (torch.baddbmm.__doc__ or "")


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v; q, k, v: [N, 1, L, C].

    For wide heads torch has only its memory-efficient kernel, whose tiles are narrow. On CUDA in 16 bits without
    gradients, chunks of rows go through two library products with a softmax in float32 between them. As in fused
    kernels, probabilities are rounded once.
    """
    if not (_in_chunks(q) and q.shape[1] == 1):
        return F.scaled_dot_product_attention(q, k, v)
    return in_chunks(q.squeeze(1), k.squeeze(1), v.squeeze(1)).unsqueeze(1)


def _in_chunks(q: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] > WIDEST
        and _has_wide_products
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, L, C] each -> [N, L, C]."""
    rows = max(1, SCORES // (q.shape[0] * k.shape[1]))
    out, keys = torch.empty_like(v, memory_format=torch.contiguous_format), k.transpose(1, 2)
    for chunk, place in zip(q.split(rows, 1), out.split(rows, 1)):
        scores = q.new_empty(q.shape[0], chunk.shape[1], k.shape[1], dtype=torch.float32)
        # The product scales its sums; with beta 0 it does not read what it is given to add.
        torch.baddbmm(scores, chunk, keys, out_dtype=torch.float32, beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
        place.copy_(torch.bmm(scores.softmax(-1).to(v.dtype), v))
    return out
