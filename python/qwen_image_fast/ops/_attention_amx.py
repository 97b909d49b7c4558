"""joint_attention in bfloat16 on CPUs with a tile unit (Intel AMX): csrc/kernels/joint_attention_amx.h."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops import _linear
from qwen_image_fast.ops._library import _C

_OP = "joint_attention_amx"
AVAILABLE = _linear.AMX
HEAD_DIMS = (32, 64, 96, 128)


def takes(q: Tensor, k: Tensor, v: Tensor, k_lens: Sequence[int]) -> bool:
    """Whether the unit computes these: plain tensors that nobody watches, of bfloat16, with keys in every sample."""
    if not AVAILABLE or q.dtype != torch.bfloat16 or not q.is_cpu or q.shape[-1] not in HEAD_DIMS:
        return False
    if lib.on_cuda(q) or lib.watched() or not all(map(lib.has_address, (q, k, v))):
        return False
    return min(k_lens) > 0 and q.shape[-2] > 0


def joint_attention_amx(q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int]) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for each sample and head; arguments as in `joint_attention`, which `takes`.

    A sample for whose scores |q| |k| log2(e) / sqrt(head_dim) is above 80 in some head, and what is no number, is
    computed by torch's kernel. Gradients are the unit's always (`csrc/kernels/joint_attention_backward_amx.h`).
    """
    if lib.call_directly(q, k, v):
        return _forward(q, k, v, q_lens, k_lens)[0]
    return _op(q, k, v, list(q_lens), list(k_lens))[0]


def _forward(q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int]) -> tuple[Tensor, Tensor]:
    out, lse = _fake(q, k, v, q_lens, k_lens)
    q, k, v = map(_rows, (q, k, v))
    left_out = _C.joint_attention_amx(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), [t.stride(0) for t in (q, k, v)],
        list(q_lens), list(k_lens), *q.shape[1:],
    )  # fmt: skip
    if left_out:
        samples = list(zip(*_samples((q, k, v), q_lens, k_lens), out.split(list(q_lens)), lse.split(list(q_lens), 1)))
        for qi, ki, vi, out_i, lse_i in (samples[i] for i in left_out):
            found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*map(_batched, (qi, ki, vi)))
            out_i.copy_(found[0].transpose(0, 1))
            lse_i.copy_(sums[0])
    return out, lse


def _fake(q, k, v, q_lens, k_lens):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous()


def _samples(tensors: Sequence[Tensor], q_lens: Sequence[int], k_lens: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    q, k, v = tensors
    yield from (q.split(list(q_lens)), k.split(list(k_lens)), v.split(list(k_lens)))


def _batched(t: Tensor) -> Tensor:
    """[rows, heads, head_dim] -> [1, heads, rows, head_dim]."""
    return t.transpose(0, 1)[None]


_op = lib.register(
    _OP, "(Tensor q, Tensor k, Tensor v, int[] q_lens, int[] k_lens) -> (Tensor, Tensor)", _forward, _fake
)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.q_lens, ctx.k_lens = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _autograd(ctx, grad_out, _):
    q, k, v, out, lse = ctx.saved_tensors
    return *_backward_op(grad_out, q, k, v, out, lse, ctx.q_lens, ctx.k_lens), None, None


lib.register_autograd(_OP, _autograd, _setup_context)


def _backward(grad_out, q, k, v, out, lse, q_lens, k_lens):
    grads = _fake_backward(grad_out, q, k, v, out, lse, q_lens, k_lens)
    tensors = [*map(_rows, (q, k, v, out, grad_out))]
    _C.joint_attention_backward_amx(
        *(t.data_ptr() for t in tensors), lse.data_ptr(), [g.data_ptr() for g in grads],
        [t.stride(0) for t in tensors], list(q_lens), list(k_lens), *q.shape[1:],
    )  # fmt: skip
    return grads


def _fake_backward(grad_out, q, k, v, out, lse, q_lens, k_lens):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


_backward_op = lib.register(
    f"{_OP}_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] q_lens, int[] k_lens)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
