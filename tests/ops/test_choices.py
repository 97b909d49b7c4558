"""The reference and the linear kernels are chosen by thread and by task; autograd and torch.compile keep to it."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qwen_image_fast import QwenImageTransformer2DModel, ops
from qwen_image_fast.ops._choices import Choice, chosen_linear_kernels, use_reference

CHOICES = [
    (ops.reference, (), use_reference, False, True),
    (ops.linear_kernels, ("torch",), chosen_linear_kernels, "table", "torch"),
]


@pytest.fixture(params=CHOICES, ids=["reference", "linear_kernels"])
def choice(request):
    choose, args, now, default, chosen = request.param
    return lambda: choose(*args), now, default, chosen


def test_threads_choose_for_themselves(choice):
    """Two threads overlap, each enters and leaves while the other is inside; a third one only looks."""
    choose, now, default, chosen = choice
    meet = threading.Barrier(3, timeout=600)

    def first():
        with choose():
            meet.wait()  # inside, the second still outside
            seen = [now()]
            meet.wait()
            meet.wait()  # the second is inside
        meet.wait()  # outside, the second still inside
        return [*seen, now()]

    def second():
        meet.wait()
        seen = [now()]
        meet.wait()
        with choose():
            meet.wait()
            meet.wait()
            return [*seen, now()]

    def third():
        seen = []
        for _ in range(4):
            meet.wait()
            seen.append(now())
        return seen

    with ThreadPoolExecutor(3) as pool:
        found = [future.result() for future in [pool.submit(f) for f in (first, second, third)]]
    assert found == [[chosen, default], [default, chosen], [default] * 4]
    assert now() == default


def test_tasks_choose_for_themselves(choice):
    choose, now, default, chosen = choice

    async def main():
        inside, looked = asyncio.Event(), asyncio.Event()

        async def chooses():
            with choose():
                inside.set()
                await looked.wait()
                return now()

        async def looks():
            await inside.wait()
            seen = now()
            looked.set()
            return seen

        return await asyncio.gather(chooses(), looks())

    assert asyncio.run(main()) == [chosen, default] and now() == default


def test_a_context_is_carried_and_left_alone(choice):
    choose, now, default, chosen = choice
    with choose():
        copied = contextvars.copy_context()
        kept = ops.keeping_choices(now)
        with pytest.raises(ZeroDivisionError), choose():
            raise ZeroDivisionError
        assert now() == chosen
    assert copied.run(now) == chosen and kept() == chosen and now() == default
    with choose():
        assert ops.keeping_choices(now)() == chosen
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(kept).result() == chosen and pool.submit(now).result() == default


class Recorded(torch.overrides.TorchFunctionMode):
    """The names of what torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def test_results_in_threads_are_those_of_each_choice():
    """The reference of gelu_tanh asks torch for a gelu, the op does not: both at the same time, many times."""
    x = torch.randn(64, 33)
    start = threading.Barrier(2, timeout=600)

    def uses_torch():
        with Recorded() as recorded:
            ops.gelu_tanh(x)
        return "gelu" in recorded.names

    def fused():
        start.wait()
        return [uses_torch() for _ in range(50)]

    def by_reference():
        start.wait()
        seen = []
        for _ in range(50):
            with ops.reference():
                seen.append(uses_torch())
            seen.append(not uses_torch())
        return seen

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(fused), pool.submit(by_reference)
        assert not any(first.result()) and all(second.result())


@pytest.mark.parametrize("forward", ["reference", "fused"])
@pytest.mark.parametrize("backward", ["reference", "fused"])
def test_checkpointed_blocks_are_computed_again_as_at_first(forward, backward):
    """Gradients are computed in another thread and under another choice than the forward pass."""
    torch.manual_seed(3)
    model = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(8, 12, 12)
    )
    inputs = {
        "hidden_states": torch.randn(1, 6, 64), "encoder_hidden_states": torch.randn(1, 4, 24),
        "timestep": torch.tensor([0.4]), "img_shapes": [[(1, 2, 3)]],
    }  # fmt: skip

    def gradients(how):
        model.zero_grad()
        with ops.reference() if forward == "reference" else ops.linear_kernels("table"):
            loss = model(**inputs, return_dict=False)[0].square().sum()

        def run():
            with ops.reference() if how == "reference" else ops.linear_kernels("table"):
                loss.backward()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(run).result()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients(forward)
    model.enable_gradient_checkpointing()
    found = gradients(backward)
    assert wanted and all(map(torch.equal, wanted, found))


def test_compiled_once_for_each_choice():
    """The choice of the calling thread is guarded on; entered in traced code, it holds there alone."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(any("gelu_tanh" in str(node.target) for node in graph.graph.nodes))
        return graph

    def both(x):
        return ops.gelu_tanh(x), ops.linear_gelu([x], [x], [x[0]])

    compiled = torch.compile(both, fullgraph=True, backend=keep)
    x = torch.randn(8, 8)
    compiled(x)
    with ops.reference():
        compiled(x)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(compiled, x).result()
    assert graphs == [True, False]
    compiled(x)
    seen = len(graphs)
    for _ in range(3):
        compiled(x)
        with ops.reference():
            compiled(x)
    assert len(graphs) == seen


def test_a_choice_inside_of_compiled_code():
    choice = Choice("test", 1)

    def inside(x):
        with choice.of(2):
            y = x * choice.now()
        return y + choice.now()

    compiled = torch.compile(inside, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [3, 3] and choice.now() == 1
    with choice.of(5):
        assert compiled(torch.ones(2)).tolist() == [7, 7] and choice.now() == 5
