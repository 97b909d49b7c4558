import sys

import pytest
import torch
from harness import DTYPES, assert_twice_the_reference

from qwen_image_fast.ops.joint_attention import joint_attention, joint_attention_reference, preferred_backends

LENGTHS = [((7,), None), ((5, 5), None), ((12, 3, 40), None), ((4, 6), (9, 20)), ((0, 6), (9, 20)), ((3, 3), (9, 9))]


def make(q_lens, k_lens, dtype, heads=3, head_dim=32, grad=False):
    torch.manual_seed(len(q_lens) + sum(q_lens))
    k_lens = k_lens or q_lens
    rows = (sum(q_lens), sum(k_lens), sum(k_lens))
    return [torch.randn(n, heads, head_dim).to(dtype).requires_grad_(grad) for n in rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_accuracy(lengths, dtype):
    args = make(*lengths, dtype, grad=True)
    exact_args = [a.detach().double().requires_grad_() for a in args]
    ours, ref, exact = (
        f(*a, *lengths)
        for f, a in (
            (joint_attention, args),
            (joint_attention_reference, args),
            (joint_attention_reference, exact_args),
        )
    )
    assert_twice_the_reference(ours.detach(), ref.detach(), exact.detach(), "output")
    seed = torch.randn(ours.shape)
    grads = [torch.autograd.grad(o, a, seed.to(o.dtype)) for o, a in ((ours, args), (ref, args), (exact, exact_args))]
    for a, b, c in zip(*grads):
        # The arithmetic is that of torch's kernels, which differ by processor, on few numbers: two ulps more.
        assert_twice_the_reference(a, b, c, "gradient", ulps=2.0)


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


Q = torch.randn(6, 2, 8)


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
    ],
)
def test_errors(args, error, text):
    with pytest.raises(error, match=f"^joint_attention: {text}"):
        joint_attention(*args)


class OnGpu:
    """As much of a CUDA tensor as the choice of kernels looks at."""

    is_cuda, device, requires_grad = True, "cuda:0", False

    def __init__(self, dtype=torch.bfloat16, requires_grad=False):
        self.dtype, self.requires_grad = dtype, requires_grad


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
    q, k, v = make((7, 5), None, torch.bfloat16)
    expected = joint_attention(q, k, v, (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    order = preferred_backends(OnGpu())
    module = sys.modules["qwen_image_fast.ops.joint_attention"]
    monkeypatch.setattr(module, "preferred_backends", lambda q: order)
    assert torch.equal(joint_attention(q, k, v, (7, 5)), expected)
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, (7, 5)), expected)
