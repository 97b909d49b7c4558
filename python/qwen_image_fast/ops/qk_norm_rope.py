"""Per-head RMSNorm and interleaved RoPE of queries and keys of both streams, written with v into joint buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_image_fast.ops import _library as lib
from qwen_image_fast.ops._library import DTYPE_CODES, pointer

_OP = "qk_norm_rope"


def qk_norm_rope(
    img_q: Tensor,
    img_k: Tensor,
    img_v: Tensor,
    txt_q: Tensor | None,
    txt_k: Tensor,
    txt_v: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    norm_added_q: Tensor,
    norm_added_k: Tensor,
    img_rope: Tensor,
    txt_rope: Tensor,
    cu_img: Tensor,
    cu_txt: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """n = x * weight / sqrt(mean(x^2) + eps) per head; (n[2i] + i n[2i+1]) * (cos + i sin); v is copied.

    The samples of a packed batch stand one after another in each stream; in the results each sample is [text, image].

    Args:
        img_q, img_k, img_v: [image rows, heads, head_dim]; the last two dimensions contiguous, rows may be strided
            (slices of a fused projection).
        txt_q, txt_k, txt_v: [text rows, heads, head_dim], likewise. txt_q may be None: no text queries are wanted, and
            the returned q holds the image rows only (the last block).
        norm_q, norm_k, norm_added_q, norm_added_k: [head_dim] RMSNorm weights, image then text.
        img_rope, txt_rope: float32 [rows, head_dim / 2, 2], cos and sin of each token (models/rope.py).
        cu_img, cu_txt: int32 [samples + 1], first row of each sample in its stream.
        eps: added to the mean square.

    Returns:
        q, k, v: [text rows + image rows, heads, head_dim], contiguous (q: [image rows, ...] without txt_q).
        Arithmetic in float32 (float64 for float64), one rounding on store.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.
    """
    args = (img_q, img_k, img_v, txt_q, txt_k, txt_v, norm_q, norm_k, norm_added_q, norm_added_k)
    if lib.use_reference():
        return qk_norm_rope_reference(*args, img_rope, txt_rope, cu_img, cu_txt, eps)
    if lib.call_directly(*args):
        return _forward(*args, img_rope, txt_rope, cu_img, cu_txt, eps)
    return _op(*args, img_rope, txt_rope, cu_img, cu_txt, eps)


def qk_norm_rope_reference(
    img_q, img_k, img_v, txt_q, txt_k, txt_v, norm_q, norm_k, norm_added_q, norm_added_k,
    img_rope, txt_rope, cu_img, cu_txt, eps=1e-6,
):  # fmt: skip
    """The formula in plain PyTorch, in the dtype of the inputs."""

    def norm_rope(x: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope.to(x.dtype)[:, None].unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def join(txt: Tensor, img: Tensor) -> Tensor:
        t, i = cu_txt.tolist(), cu_img.tolist()
        parts = [p for s in range(len(t) - 1) for p in (txt[t[s] : t[s + 1]], img[i[s] : i[s + 1]])]
        return torch.cat(parts)

    img_q, img_k = norm_rope(img_q, norm_q, img_rope), norm_rope(img_k, norm_k, img_rope)
    q = img_q if txt_q is None else join(norm_rope(txt_q, norm_added_q, txt_rope), img_q)
    return q, join(norm_rope(txt_k, norm_added_k, txt_rope), img_k), join(txt_v, img_v)


def _check(
    img_q, img_k, img_v, txt_q, txt_k, txt_v, norm_q, norm_k, norm_added_q, norm_added_k,
    img_rope, txt_rope, cu_img, cu_txt,
) -> None:  # fmt: skip
    lib.check_dtype(_OP, img_q)
    lib.check_device(_OP, img_q)
    if img_q.dim() != 3:
        lib.fail(_OP, "img_q", "have three dimensions, [rows, heads, head_dim]", tuple(img_q.shape))
    (img_rows, heads, e), txt_rows = img_q.shape, txt_k.shape[0]
    if e % 8:
        lib.fail(_OP, "head_dim", "be a multiple of 8", e)
    if e > 256 and img_q.is_cuda:
        lib.fail(_OP, "head_dim", "be at most 256 on CUDA", e)
    for name, t, rows in (
        ("img_q", img_q, img_rows), ("img_k", img_k, img_rows), ("img_v", img_v, img_rows),
        ("txt_q", txt_q, txt_rows), ("txt_k", txt_k, txt_rows), ("txt_v", txt_v, txt_rows),
    ):  # fmt: skip
        if t is None:
            continue
        lib.check_like(_OP, name, t, img_q)
        if t.shape != (rows, heads, e):
            lib.fail(_OP, name, f"have the shape {(rows, heads, e)}", tuple(t.shape))
        if rows and (t.stride(2) != 1 or (heads > 1 and t.stride(1) != e)):
            lib.fail(_OP, name, "be contiguous in its last two dimensions", f"strides {t.stride()}")
    for name, t in (
        ("norm_q", norm_q), ("norm_k", norm_k), ("norm_added_q", norm_added_q), ("norm_added_k", norm_added_k)
    ):  # fmt: skip
        lib.check_like(_OP, name, t, img_q)
        if t.shape != (e,) or not t.is_contiguous():
            lib.fail(_OP, name, f"have the shape ({e},)", tuple(t.shape))
    for name, t, rows in (("img_rope", img_rope, img_rows), ("txt_rope", txt_rope, txt_rows)):
        if t.dtype != torch.float32 or t.get_device() != img_q.get_device():
            lib.fail(_OP, name, f"be float32 on {img_q.device}", f"{t.dtype} on {t.device}")
        if t.shape != (rows, e // 2, 2) or not t.is_contiguous():
            lib.fail(_OP, name, f"be contiguous with the shape {(rows, e // 2, 2)}", tuple(t.shape))
    samples = cu_img.shape[0] - 1
    for name, t, rows in (("cu_img", cu_img, img_rows), ("cu_txt", cu_txt, txt_rows)):
        if t.dtype != torch.int32 or t.get_device() != img_q.get_device():
            lib.fail(_OP, name, f"be int32 on {img_q.device}", f"{t.dtype} on {t.device}")
        if t.shape != (samples + 1,) or samples < 1 or not t.is_contiguous():
            lib.fail(_OP, name, "have samples + 1 entries, one number of samples for both streams", tuple(t.shape))
        lib.check_cumulative(_OP, name, t, rows)


def _stream(q, k, v, q_weight, k_weight, rope, cu):
    """A stream as bindings.cpp takes it."""
    return (
        pointer(q), k.data_ptr(), v.data_ptr(), 0 if q is None else q.stride(0), k.stride(0), v.stride(0),
        q_weight.data_ptr(), k_weight.data_ptr(), rope.data_ptr(), cu.data_ptr(), k.shape[0],
    )  # fmt: skip


def _forward(
    img_q, img_k, img_v, txt_q, txt_k, txt_v, norm_q, norm_k, norm_added_q, norm_added_k,
    img_rope, txt_rope, cu_img, cu_txt, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _fake(
        img_q, img_k, img_v, txt_q, txt_k, txt_v, norm_q, norm_k, norm_added_q, norm_added_k,
        img_rope, txt_rope, cu_img, cu_txt, eps,
    )  # fmt: skip
    img_rope, txt_rope = lib.aligned(img_rope), lib.aligned(txt_rope)
    lib.launch(
        "qk_norm_rope_forward", q,
        _stream(txt_q, txt_k, txt_v, norm_added_q, norm_added_k, txt_rope, cu_txt),
        _stream(img_q, img_k, img_v, norm_q, norm_k, img_rope, cu_img),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cu_img.shape[0] - 1, *img_q.shape[1:], eps, DTYPE_CODES[q.dtype],
    )  # fmt: skip
    return q, k, v


def _fake(
    img_q, img_k, img_v, txt_q, txt_k, txt_v, norm_q, norm_k, norm_added_q, norm_added_k,
    img_rope, txt_rope, cu_img, cu_txt, eps,
):  # fmt: skip
    _check(
        img_q, img_k, img_v, txt_q, txt_k, txt_v, norm_q, norm_k, norm_added_q, norm_added_k,
        img_rope, txt_rope, cu_img, cu_txt,
    )  # fmt: skip
    joint = (txt_k.shape[0] + img_k.shape[0], *img_q.shape[1:])
    q = img_q.new_empty(img_q.shape if txt_q is None else joint)
    return q, img_q.new_empty(joint), img_q.new_empty(joint)


def _backward(
    grad_q, grad_k, grad_v, img_q, img_k, txt_q, txt_k, norm_q, norm_k, norm_added_q, norm_added_k,
    img_rope, txt_rope, cu_img, cu_txt, eps: float,
):  # fmt: skip
    grad_q, grad_k, grad_v = (lib.aligned(g.contiguous()) for g in (grad_q, grad_k, grad_v))
    img_rope, txt_rope = lib.aligned(img_rope), lib.aligned(txt_rope)
    grads = _backward_fake(
        grad_q, grad_k, grad_v, img_q, img_k, txt_q, txt_k, norm_q, norm_k, norm_added_q, norm_added_k,
        img_rope, txt_rope, cu_img, cu_txt, eps,
    )  # fmt: skip
    g_img_q, g_img_k, g_img_v, g_txt_q, g_txt_k, g_txt_v, *g_norms = grads
    # The kernel reads no v backward; k stands in for its pointer and stride.
    lib.launch(
        "qk_norm_rope_backward", img_q,
        _stream(txt_q, txt_k, txt_k, norm_added_q, norm_added_k, txt_rope, cu_txt),
        _stream(img_q, img_k, img_k, norm_q, norm_k, img_rope, cu_img),
        grad_q.data_ptr(), grad_k.data_ptr(), grad_v.data_ptr(), cu_img.shape[0] - 1, *img_q.shape[1:], eps,
        DTYPE_CODES[img_q.dtype],
        (g_txt_q.data_ptr(), g_txt_k.data_ptr(), g_txt_v.data_ptr(), g_norms[2].data_ptr(), g_norms[3].data_ptr()),
        (g_img_q.data_ptr(), g_img_k.data_ptr(), g_img_v.data_ptr(), g_norms[0].data_ptr(), g_norms[1].data_ptr()),
        scratch=(txt_k.shape[0], img_k.shape[0], img_q.shape[2]),
    )  # fmt: skip
    if txt_q is None:
        g_norms[2].zero_()
    return grads


def _backward_fake(
    grad_q, grad_k, grad_v, img_q, img_k, txt_q, txt_k, norm_q, norm_k, norm_added_q, norm_added_k,
    img_rope, txt_rope, cu_img, cu_txt, eps,
):  # fmt: skip
    img = [img_q.new_empty(img_q.shape) for _ in range(3)]
    txt = [txt_k.new_empty(0 if i == 0 and txt_q is None else txt_k.shape) for i in range(3)]
    norms = [torch.empty_like(w) for w in (norm_q, norm_k, norm_added_q, norm_added_k)]
    return (*img, *txt, *norms)


_NORMS = "Tensor norm_q, Tensor norm_k, Tensor norm_added_q, Tensor norm_added_k"
_PLACES = "Tensor img_rope, Tensor txt_rope, Tensor cu_img, Tensor cu_txt, float eps"
_op = lib.register(
    _OP,
    "(Tensor img_q, Tensor img_k, Tensor img_v, Tensor? txt_q, Tensor txt_k, Tensor txt_v,"
    f" {_NORMS}, {_PLACES}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
_backward_op = lib.register(
    f"{_OP}_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor img_q, Tensor img_k, Tensor? txt_q, Tensor txt_k,"
    f" {_NORMS}, {_PLACES}) -> ({', '.join(['Tensor'] * 10)})",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    img_q, img_k, _, txt_q, txt_k, _, *rest, ctx.eps = inputs
    ctx.save_for_backward(img_q, img_k, txt_q, txt_k, *rest)


def _autograd(ctx, grad_q, grad_k, grad_v):
    saved = ctx.saved_tensors
    grads = list(_backward_op(grad_q, grad_k, grad_v, *saved, ctx.eps))
    if saved[2] is None:
        grads[3] = None
    return *grads, None, None, None, None, None


lib.register_autograd(_OP, _autograd, _setup_context)
