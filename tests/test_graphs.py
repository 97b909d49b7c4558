"""Graphs of the sampling loop with a fake capture on the CPU: what is captured, replayed, and captured anew."""

import sys
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from graphs_harness import FakeCapture

from qwen_image_fast import QwenImagePipeline, reference
from qwen_image_fast.graphs import CudaCapture, StepGraphs
from qwen_image_fast.models.modulation import Modulation
from qwen_image_fast.models.packing import pack

CALL = {"prompt": "a cat", "negative_prompt": " ", "height": 32, "width": 32, "num_inference_steps": 3, "seed": 1,
        "output_type": "latent", "progress": False}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


@pytest.fixture
def capture(pipe):
    capture = FakeCapture()
    pipe.cuda_graphs = StepGraphs(2, capture)
    return capture


def latents(pipe, **changes):
    return pipe(**{**CALL, **changes}).images.clone()


def without_graphs(pipe, **changes):
    graphs, pipe.cuda_graphs = pipe.cuda_graphs, None
    try:
        return latents(pipe, **changes)
    finally:
        pipe.cuda_graphs = graphs


def test_one_capture_for_all_steps_and_later_calls(pipe, capture):
    expected = without_graphs(pipe)
    assert torch.equal(latents(pipe), expected) and (capture.captures, capture.replays) == (1, 2)
    assert torch.equal(latents(pipe), expected) and (capture.captures, capture.replays) == (1, 5)
    other = latents(pipe, seed=2)
    assert torch.equal(other, without_graphs(pipe, seed=2)) and not torch.equal(other, expected)
    assert capture.captures == 1


def test_a_new_schedule_replays_the_same_graph(pipe, capture):
    latents(pipe)
    for changes in ({"num_inference_steps": 5}, {"sigmas": [1.0, 0.5, 0.2]}, {"true_cfg_scale": 2.0}):
        assert torch.equal(latents(pipe, **changes), without_graphs(pipe, **changes))
    assert capture.captures == 1


def test_a_text_of_the_same_length_replays_the_same_graph(pipe, capture):
    latents(pipe, prompt="a cat")
    assert torch.equal(latents(pipe, prompt="a dog"), without_graphs(pipe, prompt="a dog"))
    assert capture.captures == 1


def test_inside_and_outside_of_inference_mode(pipe, capture):
    """The tensors of a graph made in inference mode are written later outside of it."""
    latents(pipe)
    captured = next(iter(pipe.cuda_graphs._graphs.values()))
    assert not any(t.is_inference() for t in captured.inputs)


def test_other_shapes_have_their_own_graphs_and_leave_together(pipe, capture):
    kept = []
    for width in (32, 48, 64, 48, 64):
        assert torch.equal(latents(pipe, width=width), without_graphs(pipe, width=width))
        kept.append((capture.captures, len(pipe.cuda_graphs)))
        assert capture.live == len(pipe.cuda_graphs)
    assert kept == [(1, 1), (2, 2), (3, 1), (4, 2), (4, 2)]


@pytest.fixture
def by_rows(monkeypatch):
    """Products and attention whose bits do not depend on the number of rows, as those of torch on a CPU may."""
    module = sys.modules["qwen_image_fast.ops.joint_attention"]
    attend = module._sdpa

    def linear(self, x):
        return torch.cat([torch.nn.functional.linear(row, self.weight, self.bias) for row in x.split(1)])

    def attention(q, k, v):
        return torch.cat([attend(row, k, v) for row in q.split(1, 1)], 1)

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    monkeypatch.setattr(module, "_sdpa", attention)


TEXTS = ["a cat", "a red circle on a green square", "x " * 40, " "]


@pytest.mark.parametrize("call", [{}, {"negative_prompt": None}, {"prompt": ["a cat", "a small red circle"]}], ids=str)
def test_a_bucket_of_texts_replays_one_graph(pipe, call, by_rows):
    """With the bits of what has no filling."""
    capture = FakeCapture()
    pipe.cuda_graphs = StepGraphs(4, capture, "any")
    for text in TEXTS:
        given = call | {"prompt": [text, *call["prompt"][1:]] if isinstance(call.get("prompt"), list) else text}
        if "negative_prompt" not in call and isinstance(given["prompt"], list):
            given["negative_prompt"] = [" ", "blue"]
        assert torch.equal(latents(pipe, **given), without_graphs(pipe, **given))
    buckets = [graph.layout.bounds.txt for graph in pipe.cuda_graphs._graphs.values()]
    assert len(set(buckets)) == len(buckets) == capture.captures in (1, 2, 3)
    assert capture.replays == 3 * len(TEXTS) - capture.captures


def test_filled_rows_as_torch_computes_them(pipe):
    """Its products and attention may differ in the last bit by the number of rows."""
    pipe.cuda_graphs = StepGraphs(2, FakeCapture(), "any")
    for text in TEXTS[:2]:
        torch.testing.assert_close(latents(pipe, prompt=text), without_graphs(pipe, prompt=text), rtol=1e-5, atol=1e-5)


def test_samples_that_differ_in_step_and_size(pipe, monkeypatch, by_rows):
    """A modulation for each sample, and references modulated at no noise: the filling belongs to the last."""
    transformer, capture = pipe.transformer, FakeCapture()
    monkeypatch.setattr(transformer, "config", type(transformer.config)({**transformer.config, "zero_cond_t": True}))
    graphs = StepGraphs(2, capture, "any")
    shapes = (((1, 2, 3), (1, 2, 2)), ((1, 4, 3), (1, 1, 2)))
    for lens in ((3, 9), (20, 1), (1, 63), (30, 35)):
        layout = pack(shapes, lens, axes_dim=transformer.config.axes_dims_rope, zero_cond_t=True, targets=[1, 1])
        channels = transformer.config.in_channels
        img, txt = torch.randn(len(layout.img_rope), channels), torch.randn(sum(lens), transformer.inner_dim)
        with torch.no_grad():
            modulation = transformer.sample_modulation(torch.tensor([0.3, 0.9]))
            inputs = img, txt, layout, modulation
            assert torch.equal(graphs.forward(transformer, *inputs), transformer.forward_packed(*inputs))
    assert (capture.captures, capture.replays) == (2, 2)


def test_which_lengths_a_graph_serves(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr("qwen_image_fast.graphs.any_length", lambda q, shortest: asked.append((q, shortest)))
    pipe.cuda_graphs = StepGraphs(2, FakeCapture())
    latents(pipe, width=64)
    ((q, shortest),) = asked
    config = pipe.transformer.config
    assert q.shape[-2:] == (config.num_attention_heads, config.attention_head_dim) and shortest == 2 * 4
    with pytest.raises(ValueError, match="^StepGraphs: lengths must be 'auto', 'any' or 'one', got 'two'"):
        StepGraphs(lengths="two")


def test_clear(pipe, capture):
    latents(pipe)
    pipe.cuda_graphs.clear()
    assert len(pipe.cuda_graphs) == 0
    latents(pipe)
    assert capture.captures == 2


@pytest.mark.parametrize("lengths", ["one", "any"])
def test_a_graph_keeps_what_it_reads(lengths):
    """Rows and offsets of a layout are the same at every call and no inputs: the first call's must not be freed."""
    layout = pack((((1, 2, 2), (1, 2, 2)),), [3], axes_dim=(4, 6, 6), targets=[1])
    kept = [weakref.ref(t) for t in (layout.targets, layout.cu_targets)]
    graphs = StepGraphs(1, FakeCapture(), lengths)
    transformer = SimpleNamespace(forward_packed=lambda img, txt, layout, modulation: img.clone())
    modulation = Modulation([torch.zeros(1)], [torch.zeros(1)], torch.zeros(1))
    graphs.forward(transformer, torch.zeros(8, 4), torch.zeros(3, 4), layout, modulation)
    del layout
    assert all(reference() is not None for reference in kept)
    graphs.clear()
    assert all(reference() is None for reference in kept)


def scale_weight(pipe):
    """In place: the graph reads the same memory, nothing is captured anew."""
    with torch.no_grad():
        pipe.transformer.img_in.weight.mul_(1.5)
    return False


def replace_weight(pipe):
    layer = pipe.transformer.img_in
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)
    return True


def add_hook(pipe):
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda m, a, out: out * 1.5)
    return True


def other_hook(pipe):
    """One hook in the place of another."""
    layer = pipe.transformer.transformer_blocks[0].attn.to_k
    layer._forward_hooks.clear()
    layer.register_forward_hook(lambda m, a, out: out * 1.5)
    return True


@pytest.mark.parametrize("change", [scale_weight, replace_weight, add_hook, other_hook])
def test_changes_of_the_transformer(pipe, capture, change):
    pipe.transformer.transformer_blocks[0].attn.to_k.register_forward_hook(lambda m, a, out: out)
    before = latents(pipe)
    anew = change(pipe)
    after = latents(pipe)
    assert not torch.equal(after, before) and torch.equal(after, without_graphs(pipe))
    assert capture.captures == 1 + anew and len(pipe.cuda_graphs) == 1


def test_lora_of_the_pipeline(pipe, capture):
    """A graph reads an adapter's matrices where they lie: another adapter, weight or rank has others."""
    torch.manual_seed(0)
    for name, rank in (("a", 2), ("b", 2), ("c", 4)):
        key = "transformer_blocks.0.attn.to_q.lora_{}.weight"
        lora = {key.format("A"): torch.randn(rank, 192), key.format("B"): torch.randn(192, rank) / 50}
        pipe.load_lora_weights(lora, adapter_name=name)
    changes = (("a", 1.0), ("b", 1.0), ("c", 1.0), ("c", 0.5), ([], []))
    for number, change in enumerate(changes):
        pipe.set_adapters(*change)
        assert torch.equal(latents(pipe), without_graphs(pipe)) and capture.captures == number + 1
    latents(pipe)
    assert capture.captures == len(changes)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_lora(pipe, capture, kind):
    """Added, scaled, switched off, merged: each time the images are those without graphs."""
    peft = pytest.importorskip("peft")
    seen = [latents(pipe)]
    targets = {"r": 2, "target_modules": ["to_q", "add_q_proj"]}
    if kind in ("LoHa", "LoKr"):
        config = getattr(peft, f"{kind}Config")(alpha=400, init_weights=False, **targets)
    else:
        config = peft.LoraConfig(lora_alpha=4, use_dora=kind == "DoRA", init_lora_weights=False, **targets)
    model = peft.inject_adapter_in_model(config, pipe.transformer)
    layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]

    def scaled():
        for layer in layers:
            layer.scaling["default"] *= 3

    def off():
        for layer in layers:
            layer.enable_adapters(False)

    def merged():
        for layer in layers:
            layer.enable_adapters(True)
            layer.merge()

    for number, change in enumerate((lambda: None, scaled, off, merged)):
        change()
        seen.append(latents(pipe))
        assert capture.captures == number + 2
        torch.testing.assert_close(seen[-1], without_graphs(pipe), rtol=0, atol=0)
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])
    assert torch.equal(seen[3], seen[0]) and not torch.equal(seen[4], seen[3])


def test_the_references_of_the_ops_are_captured_anew(pipe, capture):
    before = latents(pipe)
    with reference():
        assert torch.equal(latents(pipe), without_graphs(pipe))
    assert torch.equal(latents(pipe), before) and capture.captures == 3


def test_released_modulation_weights(tiny_folder):
    pipe = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    capture = FakeCapture()
    pipe.cuda_graphs = StepGraphs(2, capture)
    first = latents(pipe)
    assert torch.equal(latents(pipe), first) and capture.captures == 1


def test_switch(pipe):
    with pytest.raises(ValueError, match="^enable_cuda_graphs: the transformer must be on cuda, got cpu"):
        pipe.enable_cuda_graphs()
    pipe.transformer.to("meta")
    with pytest.raises(ValueError, match="got meta"):
        pipe.enable_cuda_graphs()
    pipe.cuda_graphs = StepGraphs(1, FakeCapture())
    pipe.disable_cuda_graphs()
    assert pipe.cuda_graphs is None
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        StepGraphs(0)


def test_a_capture_that_fails_takes_all_graphs_with_it(pipe, capture, monkeypatch):
    latents(pipe)
    monkeypatch.setattr(FakeCapture, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latents(pipe, width=48)
    assert len(pipe.cuda_graphs) == capture.live == 0


# ---- the capture with CUDA graphs, on a torch.cuda that only writes down what it is asked for -----------------------


@pytest.fixture
def cuda(monkeypatch):
    asked, pools = [], iter("abcdef")

    class Stream:
        device_index = 1

        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            asked.append("replay")

    @contextmanager
    def context(*what, **more):
        asked.append((*what[1 if more else 0 :], *more.values()))
        yield
        asked.append("end")

    fakes = {
        "device": context, "stream": context, "graph": context, "current_device": lambda: 1, "Stream": Stream,
        "current_stream": Stream, "graph_pool_handle": lambda: next(pools), "CUDAGraph": Graph,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return asked


def test_graphs_that_end_together_share_a_pool_and_a_stream(cuda):
    """A first run on the stream that is then captured, on the device of the inputs; no pool outlives a retire."""
    capture, device = CudaCapture(), torch.device("cuda", 1)
    for pool in "aab":
        cuda.clear()
        if pool == "b":
            capture.retire()
        replay, out = capture(lambda: cuda.append("run") or torch.zeros(1), device)
        stream = capture.stream
        assert cuda == [(device,), (stream,), "run", "end", (pool, stream), "run", "end", "replay", "end"]
        replay()
        assert cuda[-1] == "replay" and out == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: out of memory"),  # from instantiating the graph
        "hidden",
    ],
    ids=str,
)
def test_no_memory_for_a_graph(cuda, error):
    def fail():
        if error != "hidden":
            raise error
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError, match="memory pool must fit beside the model, and does not; keep fewer shapes"):
        CudaCapture()(fail, torch.device("cuda", 1))


def test_other_errors_of_a_capture(cuda):
    def fail():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="^something else"):
        CudaCapture()(fail, torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="^CUDA graphs: the transformer must be on a CUDA device, got cpu"):
        CudaCapture()(fail, torch.device("cpu"))
