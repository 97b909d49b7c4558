"""One body of tests for every fused op: accuracy of results and gradients, gradcheck, opcheck, compile, determinism.

An op file in this folder describes its op as an `Op` and calls `check_*`. The rule of accuracy: against the reference
computed in float64, the op may err at most twice as much as the reference itself errs in that dtype, in the maximum
and in the root mean square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_image_fast import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INSTRUCTION_SETS = [s for s in ("baseline", "avx2", "avx512") if s in _C.build_info()["cpu_kernels"]]
INSTRUCTION_SETS = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_C.build_info()["cpu_best"]) + 1]


@dataclass
class Op:
    fn: Callable
    reference: Callable
    # Positional inputs: tensors are cast to the dtype under test unless named in `fixed`; the rest is passed as it is.
    make: Callable[..., tuple]
    fixed: set[int] = field(default_factory=set)

    def inputs(self, dtype: torch.dtype, *shape, grad: bool = False) -> list:
        torch.manual_seed(sum(int(s) for s in shape if isinstance(s, int)) + 7)
        args = []
        for i, a in enumerate(self.make(*shape)):
            if isinstance(a, Tensor) and a.is_floating_point() and i not in self.fixed:
                a = a.to(dtype).detach().requires_grad_(grad)
            args.append(a)
        return args

    def differentiable(self, args: list) -> list[Tensor]:
        return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def results(fn: Callable, args: list) -> tuple[Tensor, ...]:
    out = fn(*args)
    return out if isinstance(out, tuple) else (out,)


def upcast(op: Op, args: list) -> list:
    def one(i, a):
        if isinstance(a, Tensor) and a.is_floating_point() and i not in op.fixed:
            return a.detach().double().requires_grad_(a.requires_grad)
        return a

    return [one(i, a) for i, a in enumerate(args)]


def assert_twice_the_reference(ours: Tensor, reference: Tensor, exact: Tensor, what: str, ulps: float = 0.5) -> None:
    assert torch.isfinite(ours).all(), f"{what}: not finite (an element was never written, or the arithmetic broke)"
    eps = torch.finfo(ours.dtype).eps
    e_ours, e_ref = (ours.double() - exact).abs(), (reference.double() - exact).abs()
    if exact.numel() == 0:
        return
    for name, measure in (("max", torch.amax), ("rms", lambda t: t.pow(2).mean().sqrt())):
        # The second term is half a unit in the last place of the largest value: the store itself may cost that much,
        # where the reference happened to round well.
        allowed = 2 * measure(e_ref) + ulps * eps * measure(exact.abs())
        got = measure(e_ours)
        assert got <= allowed, f"{what}: {name} error {got:.3e}, allowed {allowed:.3e}"


def gradients(outs: tuple[Tensor, ...], inputs: list[Tensor], seeds: list[Tensor]) -> tuple[Tensor, ...]:
    seeds = [s.to(o.dtype) for s, o in zip(seeds, outs)]
    return torch.autograd.grad(outs, inputs, seeds, allow_unused=True, materialize_grads=True)


def check_accuracy(op: Op, dtype: torch.dtype, *shape) -> None:
    args = op.inputs(dtype, *shape, grad=True)
    exact_args = upcast(op, args)
    ours, ref, exact = results(op.fn, args), results(op.reference, args), results(op.reference, exact_args)
    for i, (a, b, c) in enumerate(zip(ours, ref, exact)):
        assert a.shape == c.shape and a.dtype == dtype
        assert_twice_the_reference(a.detach(), b.detach(), c.detach(), f"output {i}")
    with torch.inference_mode():
        for a, b in zip(results(op.fn, [x.detach() if isinstance(x, Tensor) else x for x in args]), ours):
            assert torch.equal(a, b), "the direct call and the registered op differ"

    seeds = [torch.randn(o.shape) for o in ours]
    grads = [gradients(o, op.differentiable(a), seeds) for o, a in ((ours, args), (ref, args), (exact, exact_args))]
    for i, (a, b, c) in enumerate(zip(*grads)):
        assert a.shape == c.shape and a.dtype == dtype
        assert_twice_the_reference(a, b, c, f"gradient {i}")


def check_gradcheck(op: Op, *shape) -> None:
    args = op.inputs(torch.float64, *shape, grad=True)
    assert torch.autograd.gradcheck(op.fn, args, atol=1e-7)


def check_opcheck(registered, args: list) -> None:
    torch.library.opcheck(registered, tuple(args))


def check_compile(op: Op, *shapes: tuple) -> None:
    """fullgraph, dynamic; forward and gradients bit-equal to eager."""
    torch._dynamo.reset()
    compiled = torch.compile(op.fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in shapes:
        args = op.inputs(torch.float32, *shape, grad=True)
        eager, traced = results(op.fn, args), results(compiled, args)
        seeds = [torch.randn(o.shape) for o in eager]
        for a, b in zip(eager, traced):
            assert torch.equal(a, b)
        inputs = op.differentiable(args)
        for a, b in zip(gradients(eager, inputs, seeds), gradients(traced, inputs, seeds)):
            assert torch.equal(a, b)


def check_misaligned(op: Op, dtype: torch.dtype, *shape) -> None:
    """Views that start one element into their memory give the same result."""

    def shifted(a):
        return torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape) if isinstance(a, Tensor) else a

    args = op.inputs(dtype, *shape)
    for a, b in zip(results(op.fn, args), results(op.fn, [shifted(a) for a in args])):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * torch.finfo(dtype).eps * float(a.abs().max()))


def check_deterministic(op: Op, dtype: torch.dtype, *shape) -> None:
    """The same bits for any number of threads, forward and backward."""
    args = op.inputs(dtype, *shape, grad=True)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs = results(op.fn, args)
            torch.manual_seed(0)
            grads = gradients(outs, op.differentiable(args), [torch.randn(o.shape) for o in outs])
            seen.append([*outs, *grads])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(seen[0], other):
            assert torch.equal(a, b)
