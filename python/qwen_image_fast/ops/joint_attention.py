"""Non-causal attention over joint [text, image] sequences, dense or packed; never a mask over padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_image_fast.ops import _attention_amx
from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES

try:
    from torch.nn.attention import current_flash_attention_impl
except ImportError:  # before torch 2.11
    current_flash_attention_impl = None  # type: ignore[assignment]


# Of torch's FlashAttention-3 and 4: splits of keys would depend on the longest sample, and a sample's bits are its own.
_ONE_SPLIT = {"num_splits": 1} if torch.__version__ >= "2.13" else {}


def _torch_varlen_attn(*operands: Tensor | int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler with it: a second

    splits = {} if newer_flash_attention() is None else _ONE_SPLIT
    return cast(Tensor, varlen_attn(*operands, **splits))  # type: ignore[arg-type]


# None: before torch 2.10.
varlen_attn: Callable[..., Tensor] | None = _torch_varlen_attn if find_spec("torch.nn.attention.varlen") else None
_OP = "joint_attention"
# torch 2.5 can choose among backends, but not order them.
_can_order_backends = "set_priority" in inspect.signature(sdpa_kernel).parameters
HEAD_DIMS = (32, 64, 128)  # of the kernels of this package
# Rows times heads: two tiles of 128 rows for each of the 132 multiprocessors of a Hopper GPU.
_FILLS_A_GPU = 2 * 132 * 128
# Keys times head_dim from which on torch's 16-bit attention on the CPU, with its backward, takes less time than its
# float32 one, and does so in memory: half to a quarter of the time at head_dim 128 and 256 to 2048 keys.
_LONG_ON_CPU = 256 * 128


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int] | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for each sample of a packed batch and each head.

    No padding is computed and no sample sees another. Which kernels run, `attention_kernel` tells: samples of equal
    length are one dense batch for torch's scaled_dot_product_attention; mixed lengths on CUDA in 16 bit are one launch.
    Autograd, fake tensors and torch.compile come with all of them (the lengths are Python numbers: a new set of lengths
    is a new graph). On GPUs from Hopper on, dense passes without gradients prefer cuDNN's kernels to those of
    FlashAttention-2 (`preferred_backends`). On the CPU bfloat16 runs on a tile unit where there is one, gradients too
    (`joint_attention_amx`); elsewhere gradients of few keys in 16 bit come by float32.

    Args:
        q: [sum of q_lens, heads, head_dim]; k, v: [sum of k_lens, heads, head_dim]; one dtype.
        q_lens: rows of each sample in q. k_lens: in k and v; None: q_lens.
        cu_q, cu_k: the same as int32 [samples + 1] on the device, first row of each sample; for mixed lengths on CUDA,
            where torch's kernel reads them there. None: copied there at each call, which a CUDA graph cannot capture.

    Returns:
        [sum of q_lens, heads, head_dim], dtype of q. A sample without queries gives no rows.

    Raises:
        ValueError, TypeError: lengths that do not add up, shapes, dtypes or devices that do not fit together.
    """
    parts = joint_attention_parts(q, k, v, q_lens, k_lens, cu_q, cu_k)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def joint_attention_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int] | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> list[Tensor]:
    """`joint_attention` in as many tensors as kernels computed: the rows of all samples, or of each."""
    k_lens = q_lens if k_lens is None else k_lens
    _check(q, k, v, q_lens, k_lens)
    _check_offsets(q, cu_q=(cu_q, q_lens), cu_k=(cu_k, k_lens))
    if lib.use_reference():
        return [joint_attention_reference(q, k, v, q_lens, k_lens)]
    if _attention_amx.takes(q, k, v, k_lens):
        return [_attention_amx.joint_attention_amx(q, k, v, q_lens, k_lens)]
    kernel = attention_kernel(q, q_lens, k_lens)
    if kernel == "dense":
        out = _attend(*(t.unflatten(0, (len(q_lens), -1)) for t in (q, k, v)))
        return [out.flatten(0, 1)]
    if kernel == "varlen":
        cu_q = _cumulative(q_lens, q) if cu_q is None else cu_q
        cu_k = _cumulative(k_lens, q) if cu_k is None else cu_k
        return [_varlen(q, k, v, cu_q, cu_k, max(q_lens), max(k_lens))]
    if kernel == "packed":
        if lib.call_directly(q, k, v):
            return [_forward(q, k, v, list(q_lens), list(k_lens))[0]]
        return [_op(q, k, v, list(q_lens), list(k_lens))[0]]
    samples = zip(q.split(list(q_lens)), k.split(list(k_lens)), v.split(list(k_lens)))
    return [_attend(qi[None], ki[None], vi[None])[0] for qi, ki, vi in samples]


def bounded_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int) -> Tensor:
    """`joint_attention` of samples whose lengths are on the device alone: a CUDA graph of it serves all lengths that
    keep to the bounds, each with the bits that `joint_attention` of mixed lengths gives.

    Args:
        q, k, v: as there, with or without rows behind those of the last sample. No gradients.
        cu_q, cu_k: int32 [samples + 1] on the device, first row of each sample.
        most_q, most_k: rows that no sample has more of, in q and in k.

    Returns:
        Like q; rows of no sample hold anything.

    Raises:
        ValueError, TypeError: as there; no kernel on CUDA reads lengths there for this dtype and head_dim; gradients.
    """
    samples = cu_q.shape[0] - 1
    _check(q, k, v, *([len(t)] + [0] * (samples - 1) for t in (q, k)))
    _check_offsets(q, cu_q=(cu_q, range(samples)), cu_k=(cu_k, range(samples)))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        lib.fail("bounded_attention", "q, k and v", "need no gradients", "some that do")
    if not lib.on_cuda(q) or lib.use_reference():
        lens = [cu.diff().tolist() for cu in (cu_q, cu_k)]
        rows, keys = map(sum, lens)
        out = q.new_zeros(q.shape)
        out[:rows] = joint_attention(q[:rows], k[:keys], v[:keys], lens[0], lens[1])
        return out
    kernel = mixed_kernel(q)
    if kernel == "varlen":
        return _varlen(q, k, v, cu_q, cu_k, most_q, most_k)
    if kernel == "packed":
        rest = [0] * (samples - 1)
        return _forward(q, k, v, [len(q), *rest], [len(k), *rest], cu_q, cu_k)[0]
    lib.fail("bounded_attention", "q", "have 16 bits and a head_dim that a kernel takes", f"{q.dtype}, {q.shape[-1]}")


def attention_kernel(q: Tensor, q_lens: Sequence[int], k_lens: Sequence[int]) -> str:
    """What computes a batch.

    "dense": torch's scaled_dot_product_attention, for samples of equal length. "varlen": torch's kernel for mixed
    lengths, on CUDA in 16 bit. "packed": the kernel of this package, where torch has none. "loop": one sample after
    another, by scaled_dot_product_attention. On CUDA that is for samples which each fill a GPU where cuDNN is
    preferred: on Hopper it computes forward 1.6 times as fast as FlashAttention-2 does (609 and 370 TFLOP/s at 4096
    tokens and head_dim 128, FlashAttention's assets/flash3_fp16_fwd.png), and "varlen" and "packed" are of that kind,
    unless the caller has activated another FlashAttention for torch: `activate_flash_attention_impl("FA3")` makes
    "varlen" as fast. cuDNN makes a plan for each exact length, which takes it half a second; FlashAttention makes none.
    """
    if len(set(q_lens)) == 1 and len(set(k_lens)) == 1:
        return "dense"
    return mixed_kernel(q, min(q_lens))


def mixed_kernel(q: Tensor, shortest: int = 0) -> str:
    """`attention_kernel` of samples of mixed lengths, of which none has fewer than `shortest` rows in q."""
    if not lib.on_cuda(q) or q.dtype not in (torch.float16, torch.bfloat16):
        return "loop"
    if newer_flash_attention() is None and preferred_backends(q) and shortest * q.shape[-2] >= _FILLS_A_GPU:
        return "loop"
    if varlen_attn is not None and q.is_cuda and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        return "varlen"
    return "packed" if q.shape[-1] in HEAD_DIMS else "loop"


def any_length(q: Tensor, shortest: int) -> bool:
    """Whether a CUDA graph of samples with at least `shortest` rows each should serve texts of any length: where no
    other kernel is faster than those that read lengths on the device. Where cuDNN is, a graph has one, as its plan."""
    return mixed_kernel(q, shortest) != "loop" and not lib.use_reference()


def newer_flash_attention() -> str | None:
    """The name of the implementation that `torch.nn.attention.activate_flash_attention_impl` put in FlashAttention-2's
    place in this process; None: that of torch."""
    if current_flash_attention_impl is None or torch.compiler.is_compiling():
        return None
    return current_flash_attention_impl()


def dense_backend(q: Tensor) -> SDPBackend:
    """Which of its kernels torch takes for a dense batch [B, L, H, E] of queries, keys and values like `q`."""
    backends, t = preferred_backends(q), q.transpose(1, 2)
    if backends:
        with sdpa_kernel(backends, set_priority=True):
            return SDPBackend(torch._fused_sdp_choice(t, t, t))
    return SDPBackend(torch._fused_sdp_choice(t, t, t))


def describe_attention(device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> tuple[str, str, str]:
    """Which kernels run there without gradients, in words: for samples of equal lengths, and of mixed lengths; and
    which lengths of text a CUDA graph serves."""
    q = torch.empty(1, 8, 24, head_dim, dtype=dtype, device=device)
    newer = newer_flash_attention()
    varlen = "varlen_attn of torch" + (f" ({newer})" if newer else "")
    names = {"varlen": varlen, "packed": "kernel of this package", "loop": "one sample after another"}
    with torch.no_grad():
        dense = f"{dense_backend(q).name.lower()} of torch"
        short, long = (names[attention_kernel(q[0], lens, lens)] for lens in ((3, 5), (4096, 4160)))
        graphs = ["none" if not lib.on_cuda(q) else "any" if any_length(q[0], n) else "one" for n in (3, 4096)]
    if graphs[0] != graphs[1]:
        graphs[0] += f"; {graphs[1]} where samples are long, unless torch.nn.attention has FA3 activated"
    if not lib.on_cuda(q) and _attention_amx.takes(q[0], q[0], q[0], [1]):
        dense = short = long = "tile unit (joint_attention_amx)"
    return dense, short if short == long else f"{short}; {long} where samples are long", graphs[0]


def _as_kernels_read(t: Tensor) -> Tensor:
    """CUDA kernels read 16 bytes at once, and torch's do not all look whether they may: a fault would end the process.

    Under torch.compile, which copies inputs that are not aligned, nothing is known of addresses.
    """
    if not lib.has_address(t):
        return t
    steps = [t.data_ptr()]
    if t.shape[-1] * t.itemsize % 16 == 0:  # else no copy would bring the rows there, and torch pads them
        steps += [s * t.itemsize for s, n in zip(t.stride()[:-1], t.shape) if n > 1]
    if t.stride(-1) == 1 and not any(n % 16 for n in steps):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int) -> Tensor:
    q, k, v = map(_as_kernels_read, (q, k, v))
    assert varlen_attn is not None
    return varlen_attn(q, k, v, cu_q, cu_k, most_q, most_k)


def _cumulative(lens: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=like.device)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, H, E] -> [B, L, H, E]."""
    if _short_with_gradient(q, k.shape[1]):
        return _sdpa(q.float(), k.float(), v.float()).to(q.dtype)
    if lib.on_cuda(q):
        q, k, v = map(_as_kernels_read, (q, k, v))
    backends = preferred_backends(q) if q.numel() else []
    if backends:
        with sdpa_kernel(backends, set_priority=True):
            return _sdpa(q, k, v)
    return _sdpa(q, k, v)


def _short_with_gradient(q: Tensor, keys: int) -> bool:
    """torch's backward of short 16-bit attention on the CPU takes up to four times as long as its float32 one."""
    in_16_bits = q.device.type == "cpu" and q.dtype.itemsize == 2
    return in_16_bits and torch.is_grad_enabled() and q.requires_grad and keys * q.shape[-1] < _LONG_ON_CPU


def preferred_backends(q: Tensor) -> list[SDPBackend]:
    """The kernels that torch is asked to try first, in order; empty: torch's own order.

    FlashAttention-2 does not use the instructions of Hopper (sm_90) and later GPUs; cuDNN does, and so do newer ones
    that the caller may have activated. Gradients stay with torch's order.
    """
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or not _can_order_backends:
        return []
    if (torch.is_grad_enabled() and q.requires_grad) or torch.cuda.get_device_capability(q.device)[0] < 9:
        return []
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if newer_flash_attention() is not None:
        fast.reverse()
    return [*fast, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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


# ---- the kernel of this package: csrc/kernels/joint_attention.h --------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_lens: list[int], k_lens: list[int], cu_q=None, cu_k=None
) -> tuple[Tensor, Tensor]:
    out, lse = _fake(q, k, v, q_lens, k_lens)
    q, k, v = (_as_kernels_read(t.contiguous()) for t in (q, k, v))
    lib.launch(
        "joint_attention_forward", q,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), q_lens, k_lens, *q.shape[1:],
        DTYPE_CODES[q.dtype], lib.pointer(cu_q), lib.pointer(cu_k),
    )  # fmt: skip
    return out, lse


def _fake(q, k, v, q_lens, k_lens):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _backward(grad_out: Tensor, q, k, v, out, lse, q_lens: list[int], k_lens: list[int]):
    grads = _backward_fake(grad_out, q, k, v, out, lse, q_lens, k_lens)
    grad_out, q, k, v, out = (_as_kernels_read(t.contiguous()) for t in (grad_out, q, k, v, out))
    lib.launch(
        "joint_attention_backward", q,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), q_lens, k_lens, *q.shape[1:],
        DTYPE_CODES[q.dtype], grad_out.data_ptr(), *(g.data_ptr() for g in grads), scratch=q.shape[:2],
    )  # fmt: skip
    return grads


def _backward_fake(grad_out, q, k, v, out, lse, q_lens, k_lens):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_op = lib.register(
    _OP, "(Tensor q, Tensor k, Tensor v, int[] q_lens, int[] k_lens) -> (Tensor, Tensor)", _forward, _fake
)
_backward_op = lib.register(
    f"{_OP}_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] q_lens, int[] k_lens)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.q_lens, ctx.k_lens = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _autograd(ctx, grad_out, _):
    return *_backward_op(grad_out, *ctx.saved_tensors, ctx.q_lens, ctx.k_lens), None, None


lib.register_autograd(_OP, _autograd, _setup_context)


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
    if lib.on_cuda(q) and max(q.shape[0], k.shape[0]) >= 2**31:
        lib.fail(_OP, "rows", "be fewer than 2^31 on CUDA", max(q.shape[0], k.shape[0]))


def _check_offsets(q: Tensor, **offsets: tuple[Tensor | None, Sequence[int]]) -> None:
    for name, (cu, lens) in offsets.items():
        if cu is None:
            continue
        if cu.dtype != torch.int32 or cu.device != q.device:
            lib.fail(_OP, name, f"be int32 on {q.device}", f"{cu.dtype} on {cu.device}")
        if cu.shape != (len(lens) + 1,) or not cu.is_contiguous():
            lib.fail(_OP, name, f"have samples + 1 = {len(lens) + 1} entries, contiguous", tuple(cu.shape))
