import harness
import pytest
import torch
from harness import DTYPES, Op

from qwen_image_fast.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference


def rope_table(rows, head_dim):
    angle = torch.rand(rows, head_dim // 2) * 6.28
    return torch.stack([angle.cos(), angle.sin()], -1)


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def make(img_lens, txt_lens, heads, head_dim, text_q=True):
    img, txt = sum(img_lens), sum(txt_lens)

    def qkv(rows):
        return [torch.randn(rows, heads, head_dim) * 2 for _ in range(3)]

    img_q, img_k, img_v = qkv(img)
    txt_q, txt_k, txt_v = qkv(txt)
    norms = [1 + 0.3 * torch.randn(head_dim) for _ in range(4)]
    ropes = [rope_table(img, head_dim), rope_table(txt, head_dim)]
    return (img_q, img_k, img_v, txt_q if text_q else None, txt_k, txt_v, *norms, *ropes,
            cumulative(img_lens), cumulative(txt_lens))  # fmt: skip


OP = Op(qk_norm_rope, qk_norm_rope_reference, make, fixed={10, 11})
SHAPES = [
    ((1,), (1,), 1, 8),
    ((4,), (3,), 2, 24),
    ((16, 16), (5, 5), 6, 32),
    ((9, 1, 20), (0, 7, 2), 3, 40),
    ((24,), (8,), 24, 128),
]


def inputs(dtype, *shape, grad=False):
    return OP.inputs(dtype, *shape, grad=grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_q", [True, False], ids=["", "no-text-q"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, text_q, dtype, kernels):
    harness.check_accuracy(Op(OP.fn, OP.reference, lambda *_: make(*shape, text_q), OP.fixed), dtype, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_tensors(dtype, device):
    """Also RoPE's tables and the gradients that come back, which are read by 16 bytes."""
    shape = ((4,), (3,), 2, 24)
    harness.check_misaligned(OP, dtype, *shape)
    args = inputs(dtype, *shape, grad=True)
    outs = qk_norm_rope(*args)
    seeds = [torch.randn(o.shape).to(dtype) for o in outs]
    shifted = [torch.cat([s.new_zeros(1), s.flatten()])[1:].view(s.shape) for s in seeds]
    grads = [torch.autograd.grad(outs, OP.differentiable(args), s, retain_graph=True) for s in (seeds, shifted)]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_fused_projection(dtype, device):
    args = inputs(dtype, (16, 3), (5, 2), 6, 32)
    sliced = list(args)
    for first in (0, 3):
        sliced[first : first + 3] = torch.stack(args[first : first + 3], 1).unbind(1)
    assert not sliced[0].is_contiguous() and not sliced[3].is_contiguous()
    for a, b in zip(qk_norm_rope(*sliced), qk_norm_rope(*args)):
        assert torch.equal(a, b)


def test_gradcheck():
    for text_q in (True, False):
        op = Op(OP.fn, OP.reference, lambda *_, t=text_q: make((2, 1), (1, 2), 2, 8, t), OP.fixed)
        harness.check_gradcheck(op, 1)


def test_opcheck():
    for text_q in (True, False):
        args = [*inputs(torch.float32, (4, 2), (3, 1), 2, 16, text_q, grad=True), 1e-6]
        harness.check_opcheck(torch.ops.qwen_image_fast.qk_norm_rope, args)


def test_compile():
    op = Op(OP.fn, OP.reference, lambda i, t, h, e: make((i, i), (t, t), h, e), OP.fixed)
    harness.check_compile(op, (4, 3, 2, 16), (6, 3, 2, 16), (6, 5, 4, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    op = Op(OP.fn, OP.reference, lambda *_: make((150, 90), (40, 33), 4, 32), OP.fixed)
    harness.check_deterministic(op, dtype, 1)


def test_a_sample_does_not_depend_on_its_neighbours(device):
    args = inputs(torch.bfloat16, (9, 4, 20), (3, 7, 2), 3, 40)
    q, k, v = qk_norm_rope(*args)
    cu_img, cu_txt = args[12].tolist(), args[13].tolist()
    for s in range(3):
        i, t = slice(cu_img[s], cu_img[s + 1]), slice(cu_txt[s], cu_txt[s + 1])
        j = slice(cu_img[s] + cu_txt[s], cu_img[s + 1] + cu_txt[s + 1])
        n_img, n_txt = i.stop - i.start, t.stop - t.start
        alone = qk_norm_rope(*(a[i] for a in args[:3]), *(a[t] for a in args[3:6]), *args[6:10], args[10][i],
                             args[11][t], cumulative([n_img]), cumulative([n_txt]))  # fmt: skip
        for whole, part in zip((q, k, v), alone):
            assert torch.equal(whole[j], part)


def test_empty(device):
    q, k, v = qk_norm_rope(*make((0,), (0,), 2, 8))
    assert q.shape == k.shape == v.shape == (0, 2, 8)


def changed(index, value):
    args = list(make((4,), (3,), 2, 8))
    args[index] = value(args[index]) if callable(value) else value
    return args


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (make((4,), (3,), 2, 12), ValueError, "head_dim must be a multiple of 8, got 12"),
        (changed(0, lambda t: t[0]), ValueError, "img_q must have three dimensions"),
        (changed(1, lambda t: t[:2]), ValueError, r"img_k must have the shape \(4, 2, 8\), got \(2, 2, 8\)"),
        (changed(2, lambda t: t.half()), TypeError, "img_v must have the dtype of the first input"),
        (
            changed(4, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
            ValueError,
            "txt_k must be contiguous in",
        ),
        (changed(6, lambda t: t[:4]), ValueError, r"norm_q must have the shape \(8,\)"),
        (changed(10, lambda t: t.double()), ValueError, "img_rope must be float32"),
        (changed(11, lambda t: t[:2].contiguous()), ValueError, "txt_rope must be contiguous with the shape"),
        (changed(12, lambda t: t.long()), ValueError, "cu_img must be int32"),
        (changed(13, cumulative([1, 2])), ValueError, "cu_txt must have samples"),
        (changed(13, cumulative([2])), ValueError, "cu_txt must rise from 0 to the number of rows, 3"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^qk_norm_rope: {text}"):
        qk_norm_rope(*args)
