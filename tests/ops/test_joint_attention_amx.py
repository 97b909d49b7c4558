"""joint_attention on the tile unit of CPUs that have one: against float64, torch's kernel, and what it leaves to it."""

import sys

import pytest
import torch
from harness import assert_twice_the_reference

from qwen_image_fast import reference
from qwen_image_fast.ops._attention_amx import AVAILABLE, joint_attention_amx, takes
from qwen_image_fast.ops.joint_attention import joint_attention, joint_attention_reference

MODULE = sys.modules["qwen_image_fast.ops._attention_amx"]
needs_unit = pytest.mark.skipif(not AVAILABLE, reason="needs a CPU with AMX")
# Less and more than a tile, a block of 32, a task of 128 rows and 512 keys of an item; several samples.
LENGTHS = [((1,), (1,)), ((5, 40), (33, 16)), ((129,), (513,)), ((300, 0, 31), (1056, 7, 257))]


def make(q_lens, k_lens, head_dim=128, heads=3, grad=False):
    torch.manual_seed(sum(q_lens))
    rows = (sum(q_lens), sum(k_lens), sum(k_lens))
    return [torch.randn(n, heads, head_dim).bfloat16().requires_grad_(grad) for n in rows]


@pytest.fixture
def counted(monkeypatch):
    """Lengths of the calls of the kernel, and the samples that it leaves out."""
    calls = []

    class Counting:
        @staticmethod
        def joint_attention_amx(*args):
            left_out = MODULE_C.joint_attention_amx(*args)
            calls.append((args[6], left_out))
            return left_out

        @staticmethod
        def joint_attention_backward_amx(*args):
            calls.append("backward")
            MODULE_C.joint_attention_backward_amx(*args)

    MODULE_C = MODULE._C
    monkeypatch.setattr(MODULE, "_C", Counting)
    return calls


@needs_unit
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_accuracy(counted, lengths, head_dim):
    args = make(*lengths, head_dim)
    exact = joint_attention_reference(*(t.double() for t in args), *lengths)
    ours = joint_attention(*args, *lengths)
    assert counted == [(list(lengths[0]), [])]
    assert_twice_the_reference(ours, joint_attention_reference(*args, *lengths), exact, "output")
    # What rounding the weights and the result costs, and no more.
    error = (ours.double() - exact).norm() / exact.norm()
    assert error < 2.5e-3


@needs_unit
@pytest.mark.parametrize("size", [7.07, 8.37])
def test_large_scores(counted, size):
    """Up to 50 and 70 powers of two, all of one sign in a row: below and above those that are shifted."""
    q, k, v = make((130,), (600,))
    signs = torch.where(torch.arange(130) % 2 == 0, 1.0, -1.0)[:, None, None]
    unit = lambda t: t.float().abs() / t.float().norm(dim=-1, keepdim=True)  # noqa: E731
    q, k = ((size * unit(t) * 128**0.25 / 1.4427**0.5).bfloat16() for t in (signs * q.float().abs() + 0.5, k))
    q = (q.float() * signs).bfloat16()
    bound = 1.4427 / 128**0.5 * q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()
    assert bound == pytest.approx(size**2, rel=0.02)  # of kShifted = 60 and kLargest = 80, csrc/kernels
    exact = joint_attention_reference(*(t.double() for t in (q, k, v)), (130,), (600,))
    ours = joint_attention(q, k, v, (130,), (600,))
    assert counted == [([130], [])]
    assert (ours.double() - exact).norm() / exact.norm() < 4e-3


@needs_unit
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 40.0])
def test_what_may_be_too_large_is_torchs(counted, value):
    """Of two samples the one is computed by the unit as ever, the other as torch does it."""
    q, k, v = make((40, 50), (60, 70))
    alone = joint_attention(q[:40], k[:60], v[:60], (40,), (60,))
    k[60:, 1] = k[60:, 1] * value
    both = joint_attention(q, k, v, (40, 50), (60, 70))
    assert counted[-1][1] == [1]
    assert torch.equal(both[:40], alone)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q[40:], k[60:], v[60:]))
    )
    torch.testing.assert_close(both[40:], torchs[0].transpose(0, 1), rtol=0, atol=0, equal_nan=True)


@needs_unit
def test_a_sample_depends_on_itself_alone():
    """Not on the others, on threads, nor on how its rows lie in memory."""
    lens, threads = ((200, 31), (300, 257)), torch.get_num_threads()
    q, k, v = make(*lens)
    whole = joint_attention(q, k, v, *lens)
    assert torch.equal(whole[200:], joint_attention(q[200:], k[300:], v[300:], (31,), (257,)))
    wide = torch.cat([k, v], -1).view(-1, 3, 2, 128)
    assert torch.equal(whole, joint_attention(q, wide[:, :, 0], wide[:, :, 1], *lens))
    rows = torch.cat([k, v], 1)
    assert torch.equal(whole, joint_attention(q, rows[:, :3], rows[:, 3:], *lens))
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(whole, joint_attention(q, k, v, *lens))
    finally:
        torch.set_num_threads(threads)


def gradients(args, lens, seed, attention=joint_attention):
    return torch.autograd.grad(attention(*args, *lens), args, seed)


@needs_unit
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths", [*LENGTHS, ((700,), (100,))], ids=str)
def test_gradients(counted, lengths, head_dim):
    args = make(*lengths, head_dim, grad=True)
    exact_args = [t.detach().double().requires_grad_() for t in args]
    seed = torch.randn(args[0].shape).bfloat16()
    ours = gradients(args, lengths, seed)
    assert counted == [(list(lengths[0]), []), "backward"]
    exact = gradients(exact_args, lengths, seed.double(), joint_attention_reference)
    for name, mine, right in zip("qkv", ours, exact):
        assert torch.isfinite(mine).all()
        assert (mine.double() - right).norm() <= 6e-3 * right.norm() + 1e-2 * (name != "v"), name


@needs_unit
@pytest.mark.parametrize("size", [6.0, -16.0, 12.0])
def test_gradients_of_large_scores(counted, size):
    """Near one-hot weights, sums whose logarithms are far below 0, and samples whose forward pass is torch's."""
    lens = ((70, 300), (290, 300))
    q, k, v = make(*lens)
    if size < 0:  # all scores of all rows are far below 0, those of rows and keys that are none would be far above
        q, k = q.abs(), -k.abs()
    args = [t.requires_grad_() for t in ((abs(size) * q.float()).bfloat16(), k, v)]
    exact_args = [t.detach().double().requires_grad_() for t in args]
    seed = torch.randn(args[0].shape).bfloat16()
    grads = gradients(args, lens, seed)
    assert counted[1:] == ["backward"]
    exact = gradients(exact_args, lens, seed.double(), joint_attention_reference)
    for ours, right in zip(grads, exact):
        assert (ours.double() - right).norm() / right.norm() < 2e-2


@needs_unit
def test_gradients_of_a_sample_depend_on_itself_alone():
    """Not on the others, on threads, nor on how rows lie in memory; what is no number stays in its sample."""
    lens, threads = ((200, 31), (300, 257)), torch.get_num_threads()
    q, k, v = make(*lens, grad=True)
    seed = torch.randn(q.shape).bfloat16()
    whole = gradients((q, k, v), lens, seed)
    own = [t.detach()[n:].requires_grad_() for t, n in ((q, 200), (k, 300), (v, 300))]
    for part, mine, n in zip(gradients(own, ((31,), (257,)), seed[200:]), whole, (200, 300, 300)):
        assert torch.equal(part, mine[n:])
    wide = torch.cat([k, v], -1).view(-1, 3, 2, 128).detach()
    strided = [q, wide[:, :, 0].requires_grad_(), wide[:, :, 1].requires_grad_()]
    turned = seed.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, gradients(strided, lens, turned), whole))
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert all(map(torch.equal, gradients((q, k, v), lens, seed), whole))
    finally:
        torch.set_num_threads(threads)
    seed[0, 0, 0] = float("nan")
    for grad, n in zip(gradients((q, k, v), lens, seed), (200, 300, 300)):
        assert torch.isfinite(grad[n:]).all() and not torch.isfinite(grad[:n]).all()


@needs_unit
def test_what_is_left_to_torch(counted):
    lens = (40,)
    q, k, v = make(lens, lens)
    with reference():
        joint_attention(q, k, v, lens)
    joint_attention(*(t.float() for t in (q, k, v)), lens)
    joint_attention(*(t[..., :80] for t in (q, k, v)), lens)  # head_dim
    torch.compile(lambda: joint_attention(q, k, v, lens), backend="eager")()
    assert not takes(q, k, v, (0,)) and not takes(*(t.to("meta") for t in (q, k, v)), lens)
    assert not counted
    assert joint_attention_amx(q, k, v, lens, lens).shape == q.shape and counted
