import itertools
import sys

import pytest
import torch
from conftest import on_device
from harness import DTYPES, assert_twice_the_reference, check_opcheck

from qwen_image_fast import reference
from qwen_image_fast.ops.joint_attention import (
    attention_kernel,
    bounded_attention,
    dense_backend,
    describe_attention,
    joint_attention,
    joint_attention_reference,
    preferred_backends,
)

MODULE = sys.modules["qwen_image_fast.ops.joint_attention"]
LENGTHS = [
    ((7,), None), ((5, 5), None), ((12, 3, 40), None), ((4, 6), (9, 20)), ((0, 6), (9, 20)), ((3, 3), (9, 9)),
    ((6, 130, 0), (0, 33, 9)),
]  # fmt: skip


@pytest.fixture(params=["cpu", "cuda-emulated", "cuda", "cuda-packed"])
def attention(request, monkeypatch):
    """`cuda-packed`: on CUDA with the kernel of this package, also where torch has one for mixed lengths."""
    if request.param.endswith("packed"):
        monkeypatch.setattr(MODULE, "varlen_attn", None)
    with on_device(request.param.removesuffix("-packed"), request):
        yield joint_attention


def make(q_lens, k_lens, dtype, heads=3, head_dim=32, grad=False):
    torch.manual_seed(len(q_lens) + sum(q_lens))
    k_lens = k_lens or q_lens
    rows = (sum(q_lens), sum(k_lens), sum(k_lens))
    return [torch.randn(n, heads, head_dim).to(dtype).requires_grad_(grad) for n in rows]


def check(attention, args, lengths, **keywords):
    exact_args = [a.detach().double().requires_grad_() for a in args]
    ours, ref, exact = (
        f(*a, *lengths)
        for f, a in (
            (attention, args),
            (joint_attention_reference, args),
            (joint_attention_reference, exact_args),
        )
    )
    assert_twice_the_reference(ours.detach(), ref.detach(), exact.detach(), "output", **keywords)
    seed = torch.randn(ours.shape)
    grads = [torch.autograd.grad(o, a, seed.to(o.dtype)) for o, a in ((ours, args), (ref, args), (exact, exact_args))]
    for a, b, c in zip(*grads):
        # The arithmetic is that of torch's kernels, which differ by processor, on few numbers: two ulps more.
        assert_twice_the_reference(a, b, c, "gradient", ulps=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_accuracy(attention, lengths, dtype):
    check(attention, make(*lengths, dtype, grad=True), lengths)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_accuracy_of_other_widths(attention, head_dim, dtype):
    lengths = ((100, 70), (33, 161))
    check(attention, make(*lengths, dtype, heads=2, head_dim=head_dim, grad=True), lengths)


def test_scores_that_grow(attention):
    """Every tile of keys has larger scores than all before it, up to 600: sums so far are scaled down to nothing."""
    lens = (200, 9)
    q, k, v = make(lens, None, torch.bfloat16, heads=1)
    k = k.abs() * torch.arange(1, 210)[:, None, None] / 3
    args = [t.detach().to(torch.bfloat16).requires_grad_() for t in (q.abs(), k, v)]
    check(attention, args, (lens, lens))


def test_more_samples_than_a_launch_takes(attention):
    lens = [1 + i % 3 for i in range(300)]
    args = make(lens, None, torch.float16, heads=1)
    out = attention(*args, lens)
    parts = zip(*(t.double().split(lens) for t in args))
    exact = torch.cat([joint_attention_reference(*part, [len(part[0])]) for part in parts])
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


def test_strided_inputs(attention):
    """Slices of one projection, and rows that start off 16 bytes, are copied for the kernels that need them so."""
    lens = (12, 3)
    args = [t.detach() for t in make(lens, None, torch.bfloat16)]
    expected = attention(*args, lens)
    assert torch.equal(attention(*torch.stack(args, 2).unbind(2), lens), expected)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in args]
    assert torch.equal(attention(*shifted, lens), expected)


@pytest.mark.parametrize("kernel", ["dense", "varlen", "loop"])
def test_what_torchs_kernels_read_is_aligned(monkeypatch, kernel):
    """They read 16 bytes at once, and a misaligned address ends the process; samples in a loop start anywhere."""
    seen = []

    def attend(q, k, v, *_):
        seen.extend((q, k, v))
        return q

    monkeypatch.setattr(MODULE, "varlen_attn", attend)
    monkeypatch.setattr(MODULE, "_sdpa", attend)
    monkeypatch.setattr(MODULE, "attention_kernel", lambda *_: kernel)
    monkeypatch.setattr(MODULE.lib, "on_cuda", lambda t: True)
    lens = [6, 6] if kernel == "dense" else [5, 7]
    whole = torch.arange(12 * 3 * 20.0).view(12, 3, 20).bfloat16()
    row_off = torch.cat([whole.new_zeros(1), whole.flatten()])[1:].view(whole.shape)[..., :16]
    for t in (whole[..., :16], whole[..., 1:17], row_off, whole[:, 1:, :16].contiguous()):
        assert torch.equal(joint_attention(t, t, t, lens), t)
    assert len(seen) == (24 if kernel == "loop" else 12)
    for t in seen:
        assert t.data_ptr() % 16 == 0 and all(2 * s % 16 == 0 for s in t.stride()[:-1]) and t.stride(-1) == 1


@pytest.mark.parametrize(("keys", "head_dim", "kernel"), [(255, 128, torch.float32), (256, 128, torch.bfloat16),
                                                          (1024, 32, torch.bfloat16)])  # fmt: skip
def test_short_16_bit_passes_with_gradients_are_float32_on_the_cpu(monkeypatch, keys, head_dim, kernel):
    monkeypatch.setattr(MODULE._attention_amx, "AVAILABLE", False)
    sdpa, seen = MODULE._sdpa, []
    monkeypatch.setattr(MODULE, "_sdpa", lambda q, k, v: seen.append(q.dtype) or sdpa(q, k, v))
    lengths = ((9,), (keys,))
    args = make(*lengths, torch.bfloat16, heads=2, head_dim=head_dim, grad=True)
    check(joint_attention, args, lengths)
    with torch.no_grad():
        joint_attention(*args, *lengths)
    assert seen == [kernel, torch.bfloat16]


@pytest.mark.parametrize("device", ["cuda-emulated", "cuda-packed"])
def test_packed_kernel_as_an_op(request, monkeypatch, device):
    """opcheck, torch.compile, and the same bits in every run, directly and by the registered op."""
    monkeypatch.setattr(MODULE, "varlen_attn", None)
    with on_device(device.removesuffix("-packed"), request):
        lens = [12, 3]
        args = make(lens, None, torch.bfloat16, heads=2, grad=True)
        assert attention_kernel(args[0], lens, lens) == "packed"
        check_opcheck(MODULE._op, [*args, lens, lens])
        compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
        results = []
        for fn in (joint_attention, joint_attention, compiled):
            out = fn(*args, lens)
            results.append([out.detach(), *torch.autograd.grad(out, args, torch.ones_like(out))])
        with torch.no_grad():
            results.append([joint_attention(*args, lens)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [((7,), (9,)), ((5, 140), (40, 33)), ((0, 6, 129), (9, 20, 0)), ((2,) * 140, (3,) * 140)],
    ids=lambda lengths: f"{len(lengths[0])} of {max(lengths[0])}",
)
def test_lengths_on_the_device(attention, lengths, dtype):
    """The bits of the lengths that Python knows, whatever rows lie behind them; on CUDA nothing of Python's is read."""
    q_lens, k_lens = lengths
    q, k, v = make(q_lens, k_lens, dtype)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in lengths)
    expected = attention(q, k, v, q_lens, k_lens)
    for more in (0, 1, 200):
        filled = [torch.cat([t, t.new_full((more, *t.shape[1:]), float("nan"))]) for t in (q, k, v)]
        out = bounded_attention(*filled, cu_q, cu_k, max(q_lens) + more, max(k_lens) + more)
        if MODULE.attention_kernel(q, q_lens, k_lens) == "dense":  # another kernel than that of mixed lengths
            torch.testing.assert_close(out[: len(q)], expected, rtol=0.01, atol=0.01)
        else:
            assert torch.equal(out[: len(q)], expected)


def test_lengths_on_the_device_are_for_kernels_that_read_them(monkeypatch):
    q, k, v = make((3,), (4,), torch.float32, grad=True)
    cu_q, cu_k = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="^bounded_attention: q, k and v must need no gradients"):
        bounded_attention(q, k, v, cu_q, cu_k, 3, 4)
    monkeypatch.setattr(MODULE.lib, "on_cuda", lambda x: True)
    with torch.no_grad(), pytest.raises(ValueError, match="q must have 16 bits .*, got torch.float32, 32"):
        bounded_attention(q, k, v, cu_q, cu_k, 3, 4)
    with pytest.raises(ValueError, match="cu_k must have samples . 1 = 2 entries"):
        bounded_attention(q.detach(), k, v, cu_q, cu_k.repeat(2), 3, 4)


def test_torch_varlen_attention_is_called_with_offsets(monkeypatch):
    monkeypatch.setattr(MODULE._attention_amx, "AVAILABLE", False)
    seen = []

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k):
        seen.append((cu_q.tolist(), cu_k.tolist(), max_q, max_k))
        return q

    monkeypatch.setattr(MODULE, "varlen_attn", varlen)
    monkeypatch.setattr(MODULE, "attention_kernel", lambda *a: "varlen")
    q, k, v = make((4, 6), (9, 20), torch.bfloat16)
    joint_attention(q, k, v, (4, 6), (9, 20))
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 4, 10], [0, 9, 29]))
    joint_attention(q, k, v, (4, 6), (9, 20), cu_q, cu_k)
    assert seen == [([0, 4, 10], [0, 9, 29], 6, 20)] * 2
    monkeypatch.setattr(MODULE.lib, "on_cuda", lambda x: True)
    monkeypatch.setattr(MODULE, "mixed_kernel", lambda *a: "varlen")
    bounded_attention(q, k, v, cu_q, cu_k, 64, 128)
    assert seen[2:] == [([0, 4, 10], [0, 9, 29], 64, 128)]


@pytest.mark.skipif(MODULE.varlen_attn is None, reason="this torch has no kernel for mixed lengths")
def test_torch_varlen_attention_does_not_split_keys(monkeypatch):
    """By the longest sample, so that the bits of one would depend on the others."""
    import torch.nn.attention.varlen as theirs

    seen = []
    monkeypatch.setattr(theirs, "varlen_attn", lambda *operands, **splits: seen.append(splits))
    MODULE.varlen_attn()
    monkeypatch.setattr(MODULE, "newer_flash_attention", lambda: "FA3")
    MODULE.varlen_attn()
    assert seen == [{}, {"num_splits": 1} if torch.__version__ >= (2, 13) else {}]


def test_choice_of_kernels(monkeypatch):
    """Dense, else torch's kernel for mixed lengths, else that of this package, else sample by sample."""

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    def choice(lens=(3, 4), cuda=True, **keywords):
        monkeypatch.setattr(MODULE.lib, "on_cuda", lambda x: cuda)
        return attention_kernel(OnGpu(**keywords), lens, lens)

    monkeypatch.setattr(MODULE, "varlen_attn", object())
    assert choice(lens=(3, 3)) == choice(lens=(3, 3), cuda=False) == "dense"
    assert choice() == choice(head_dim=72) == "varlen"
    assert choice(head_dim=36) == choice(dtype=torch.float32) == choice(cuda=False) == "loop"
    monkeypatch.setattr(MODULE, "varlen_attn", None)
    assert choice() == choice(head_dim=64) == choice(head_dim=32, dtype=torch.float16) == "packed"
    assert choice(head_dim=72) == choice(dtype=torch.float32) == choice(cuda=False) == "loop"
    # Long samples one after another where cuDNN is preferred: on Hopper, without gradients.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    long = (12000, 11264)
    assert choice(lens=long) == "loop" and choice(lens=(12000, 11263)) == choice() == "packed"
    assert not MODULE.any_length(OnGpu(), 11264) and MODULE.any_length(OnGpu(), 11263)
    assert not MODULE.any_length(OnGpu(dtype=torch.float32), 1)
    with reference():
        assert not MODULE.any_length(OnGpu(), 11263)
    assert choice(lens=long, requires_grad=True) == "packed"
    # Unless another FlashAttention is active, which is as fast and makes no plan for each length.
    monkeypatch.setattr(MODULE, "varlen_attn", object())
    assert choice(lens=long) == "loop"
    assert MODULE.preferred_backends(OnGpu())[0].name == "CUDNN_ATTENTION"
    monkeypatch.setattr(MODULE, "current_flash_attention_impl", lambda: "FA3")
    assert choice(lens=long) == "varlen" and MODULE.any_length(OnGpu(), 12000)
    assert [b.name for b in MODULE.preferred_backends(OnGpu())[:2]] == ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
    monkeypatch.setattr(MODULE, "current_flash_attention_impl", None)
    monkeypatch.setattr(MODULE, "varlen_attn", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choice(lens=long) == "packed"


def test_what_runs_in_words(monkeypatch):
    assert dense_backend(torch.randn(1, 9, 2, 16)).name in ("FLASH_ATTENTION", "MATH")
    monkeypatch.setattr(MODULE, "current_flash_attention_impl", None)
    monkeypatch.setattr(MODULE._attention_amx, "AVAILABLE", True)
    assert describe_attention("cpu") == ("tile unit (joint_attention_amx)", "tile unit (joint_attention_amx)", "none")
    monkeypatch.setattr(MODULE._attention_amx, "AVAILABLE", False)
    assert describe_attention("cpu")[1:] == ("one sample after another", "none")
    monkeypatch.setattr(MODULE.lib, "on_cuda", lambda x: True)
    monkeypatch.setattr(MODULE, "varlen_attn", None)
    assert describe_attention("cpu")[1:] == ("kernel of this package", "any")
    with monkeypatch.context() as patched:
        patched.setattr(MODULE, "any_length", lambda q, shortest: shortest < 1000)
        assert describe_attention("cpu")[2].startswith("any; one where samples are long, unless")
    monkeypatch.setattr(MODULE, "attention_kernel", lambda *_: "varlen")
    monkeypatch.setattr(MODULE, "current_flash_attention_impl", lambda: "FA3")
    assert describe_attention("cpu")[1] == "varlen_attn of torch (FA3)"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_depend_on_its_neighbours(dtype):
    lens = (12, 3, 40)
    q, k, v = make(lens, None, dtype)
    whole = joint_attention(q, k, v, lens).split(lens)
    for i, parts in enumerate(zip(q.split(lens), k.split(lens), v.split(lens))):
        assert torch.equal(whole[i], joint_attention(*parts, lens[i : i + 1]))


def test_equal_lengths_batch_to_the_same_bits():
    q, k, v = make((33, 33), None, torch.float32)
    whole = joint_attention(q, k, v, (33, 33)).split(33)
    for i, parts in enumerate(zip(q.split(33), k.split(33), v.split(33))):
        assert torch.equal(whole[i], joint_attention(*parts, (33,)))


def test_gradcheck():
    args = make((3, 2), (4, 3), torch.float64, heads=2, head_dim=8, grad=True)
    assert torch.autograd.gradcheck(lambda *a: joint_attention(*a, (3, 2), (4, 3)), args)


def test_compile():
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    for lens in ((4, 4), (4, 7)):
        args = make(lens, None, torch.float32)
        torch.testing.assert_close(compiled(*args, lens), joint_attention(*args, lens))


Q, CU = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((Q, Q, Q, (4, 3)), ValueError, r"q_lens must add up to the rows of q, 6, got \[4, 3\]"),
        ((Q, Q[:4], Q, (6,)), ValueError, "k_lens must add up to the rows of k, 4"),
        ((Q, Q, Q, (4, 2), (6,)), ValueError, "k_lens must have 2 samples like q_lens, got 1"),
        ((Q, Q, Q, ()), ValueError, "q_lens must name at least one sample"),
        ((Q, Q[..., :4], Q, (6,)), ValueError, "k must have the heads and width of q"),
        ((Q, Q.half(), Q, (6,)), TypeError, "k must have the dtype of the first input"),
        ((Q[0], Q, Q, (6,)), ValueError, "q must have three dimensions"),
        ((Q, Q.to("meta"), Q, (6,)), ValueError, "k must be on the device of the first input, cpu, got meta"),
        ((Q, Q, Q, (6,), None, torch.tensor([0, 6])), ValueError, "cu_q must be int32 on cpu, got torch.int64 on cpu"),
        ((Q, Q, Q, (6,), None, CU.to("meta")), ValueError, "cu_q must be int32 on cpu, got torch.int32 on meta"),
        ((Q, Q, Q, (6,), None, CU, CU[:1]), ValueError, r"cu_k must have samples \+ 1 = 2 entries"),
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^joint_attention: {text}"):
        joint_attention(*args)


class OnGpu:
    """As much of a CUDA tensor as the choice of kernels looks at."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, dtype=torch.bfloat16, requires_grad=False, head_dim=128):
        self.dtype, self.requires_grad, self.shape = dtype, requires_grad, (7, 3, head_dim)


def test_cudnn_first_on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backends = preferred_backends(OnGpu())
    assert backends[0].name == "CUDNN_ATTENTION" and backends[-1].name == "MATH"
    assert preferred_backends(OnGpu(torch.float32)) == [] and preferred_backends(OnGpu(requires_grad=True)) == []
    with torch.no_grad():
        assert preferred_backends(OnGpu(requires_grad=True)) == backends
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert preferred_backends(OnGpu()) == []
    assert preferred_backends(torch.randn(1)) == []


def test_an_order_of_backends_gives_the_same_result(monkeypatch):
    monkeypatch.setattr(MODULE._attention_amx, "AVAILABLE", False)
    q, k, v = make((7, 5), None, torch.bfloat16)
    expected = joint_attention(q, k, v, (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    order = preferred_backends(OnGpu())
    monkeypatch.setattr(MODULE, "preferred_backends", lambda q: order)
    assert torch.equal(joint_attention(q, k, v, (7, 5)), expected)
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, (7, 5)), expected)
