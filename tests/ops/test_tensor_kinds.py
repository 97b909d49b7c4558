"""Tensors without values, or with other values than those in their memory, never reach a kernel: over all ops."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import qwen_image_fast
from qwen_image_fast.doctor_cases import CASES, as_tuple, functions, inputs
from qwen_image_fast.ops import _library, gate_residual_norm_modulate, gelu_tanh, layer_norm_modulate

OPS = list(CASES)
# torch runs the products and the attention itself, for lists of tensors or on devices that this torch was built for.
LISTS = [name for name in OPS if name.startswith("linear_")]


class Plain(torch.Tensor):
    """A subclass without a dispatch of its own."""


def case(name: str) -> tuple:
    op, _ = functions(name)
    args = [a.detach() if isinstance(a, Tensor) else a for a in inputs(name, 20, 128, torch.float32)]
    return op, args, as_tuple(op(*args))


def each(args: list, change) -> list:
    return [change(a) if isinstance(a, Tensor) else a for a in args]


def assert_described(outs, wanted, device: str) -> None:
    """Everything about a result but its values."""
    assert [(o.shape, o.dtype, o.stride(), o.device.type) for o in as_tuple(outs)] == [
        (w.shape, w.dtype, w.stride(), device) for w in wanted
    ]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
def test_meta(name, grad):
    op, args, wanted = case(name)
    meta = each(args, lambda a: a.to("meta").requires_grad_(grad and a.is_floating_point()))
    outs = as_tuple(op(*meta))
    assert_described(outs, wanted, "meta")
    if grad:
        sum(o.sum() for o in outs).backward()
        assert meta[0].grad.is_meta and meta[0].grad.shape == meta[0].shape


def test_meta_in_other_forms_of_the_ops():
    x, v = torch.empty(6, 64, device="meta"), torch.empty(2, 64, device="meta")
    for outs in (layer_norm_modulate(x, v, v, fp8=True), gate_residual_norm_modulate(x, x, v, v, v, fp8=True)):
        assert all(o.is_meta for o in outs) and outs[-2].dtype == torch.float8_e4m3fn
    assert gelu_tanh(x, inplace=True).is_meta


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_fake(name, device):
    """Inside of the mode and after it; also of devices without kernels here, as nothing is computed."""
    if name == "joint_attention" and device != "cpu":
        pytest.skip("torch asks the device which attention it has")
    op, args, wanted = case(name)
    with FakeTensorMode():
        fake = each(args, lambda a: torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device))
        assert_described(op(*fake), wanted, device)
    assert_described(op(*fake), wanted, device)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_device_without_kernels(device):
    class Elsewhere:
        is_cpu = is_meta = is_cuda = False

    tensor = Elsewhere()
    tensor.device = device
    with pytest.raises(NotImplementedError) as caught:
        _library.check_device("op", tensor)
    text = str(caught.value)
    assert text.startswith("op: this build has kernels for cpu") and text.endswith(
        f"got a tensor on {device}; run it under `with qwen_image_fast.reference():`, move it to the CPU"
    )
    assert not _library.call_directly(tensor)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "kind",
    [
        lambda t: t.as_subclass(Plain),
        lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
        torch._to_functional_tensor,
    ],
    ids=["subclass", "negative", "functional"],
)
def test_values_elsewhere(name, kind):
    op, args, wanted = case(name)
    outs = as_tuple(op(*each(args, kind)))
    for out, value in zip(outs, wanted, strict=True):
        out = torch._from_functional_tensor(out) if torch._is_functional_tensor(out) else out
        assert torch.equal(out.as_subclass(Tensor), value)


@pytest.mark.parametrize("name", OPS)
def test_functionalize(name):
    op, args, wanted = case(name)
    tensors = [a for a in args if isinstance(a, Tensor)]

    def run(*given):
        left = iter(given)
        return as_tuple(op(*each(args, lambda _: next(left))))

    assert all(map(torch.equal, torch.func.functionalize(run)(*tensors), wanted))


@pytest.mark.parametrize("name", [name for name in OPS if name not in LISTS])
def test_vmap(name):
    op, args, wanted = case(name)
    both = torch.vmap(lambda x: as_tuple(op(x, *args[1:])))(torch.stack([args[0], 2 * args[0]]))
    for outs, one, two in zip(both, wanted, as_tuple(op(2 * args[0], *args[1:])), strict=True):
        torch.testing.assert_close(outs, torch.stack([one, two]))


@pytest.mark.parametrize("name", [name for name in OPS if name != "joint_attention"])
def test_derivatives_that_only_the_references_have(name):
    """They were dropped silently, or met with words about somebody's autograd.Function."""
    op, args, wanted = case(name)

    def total(x):
        return sum(o.sum() for o in as_tuple(op(x, *args[1:])))

    def by_duals():
        with forward_ad.dual_level():
            out = total(forward_ad.make_dual(args[0], torch.ones_like(args[0])))
            return forward_ad.unpack_dual(out).tangent

    def by_jvp():
        return torch.func.jvp(total, (args[0],), (torch.ones_like(args[0]),))[1]

    def by_grad():
        return torch.func.grad(total)(args[0]).sum()

    def by_vmap_of_grad():
        return torch.vmap(torch.func.grad(total))(args[0][None]).sum()

    found = []
    for way in (by_duals, by_jvp, by_grad, by_vmap_of_grad):
        with pytest.raises(
            NotImplementedError, match="^qwen_image_fast: the ops have derivatives for `backward` alone"
        ):
            way()
        with qwen_image_fast.reference():
            found.append(way())
    for value in found[1:]:
        torch.testing.assert_close(value, found[0], rtol=1e-3, atol=1e-2)
    with forward_ad.dual_level():  # nothing of it is a dual
        assert all(map(torch.equal, as_tuple(op(*args)), wanted))
