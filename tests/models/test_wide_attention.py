"""Attention in chunks, with torch's products of 16 bits in float32 stood in for, against float64."""

import pytest
import torch
import torch.nn.functional as F

from qwen_image_fast.models import wide_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 45, 1000])
def test_chunks(rows, dtype, monkeypatch):
    """Errs little more than torch's kernel, whose probabilities are rounded too; a last chunk may be short."""

    def product(scores, a, b, out_dtype, beta, alpha, out):
        assert out is scores and scores.dtype == out_dtype and beta == 0
        return out.copy_(alpha * torch.bmm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(torch, "baddbmm", product)
    monkeypatch.setattr(wide_attention, "SCORES", rows * 2 * 45)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 45, 384).to(dtype) * n for n in (3, 3, 1))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    out = wide_attention.in_chunks(q, k, v)
    error = (out.double() - exact).square().mean().sqrt()
    theirs = (F.scaled_dot_product_attention(q, k, v).double() - exact).square().mean().sqrt()
    assert out.dtype == dtype and out.is_contiguous() and error <= 1.5 * theirs


def test_where():
    """On a CPU, with gradients or in float32 torch's kernel; heads that fused kernels take, too."""
    q = torch.randn(1, 1, 5, 384)
    torch.testing.assert_close(wide_attention.wide_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))

    class OnCuda(torch.Tensor):
        is_cuda = True

    def chosen(width=384, dtype=torch.bfloat16):
        return wide_attention._in_chunks(torch.zeros(1, 1, 2, width, dtype=dtype).as_subclass(OnCuda))

    assert not chosen()
    with torch.no_grad():
        assert chosen() == wide_attention._has_wide_products
        assert not chosen(256) and not chosen(dtype=torch.float32)
