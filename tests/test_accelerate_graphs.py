"""CUDA graphs under diffusers' loops, with a capture that needs no GPU: the pictures, and what keeps graphs away."""

import logging
import pickle

import pytest
import torch
from graphs_harness import FakeCapture

diffusers = pytest.importorskip("diffusers")

from test_accelerate import CFG, LONG, SHORT, copy_of, draw  # noqa: E402

from qwen_image_fast import accelerate, restore  # noqa: E402
from qwen_image_fast.graphs import StepGraphs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tiny_folder):
    pipe = diffusers.QwenImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def fast(plain):
    pipe = copy_of(plain)
    accelerate(pipe)
    return pipe


@pytest.fixture
def capture(fast, monkeypatch):
    """Of the pipeline's transformer, as if it were on a GPU."""
    monkeypatch.setattr("qwen_image_fast.drop_in.graphs.on_cuda", lambda t: not t.is_meta)
    capture = FakeCapture()
    fast.transformer.cuda_graphs = StepGraphs(4, capture, "any")
    return capture


def without(fast, **kwargs):
    graphs = fast.transformer.__dict__.pop("cuda_graphs")
    try:
        return draw(fast, **kwargs)
    finally:
        fast.transformer.cuda_graphs = graphs


def test_both_branches_and_all_prompts_replay_one_graph(fast, capture):
    """The second branch does not overwrite the first."""
    for number, prompt in enumerate((SHORT, LONG, "a dog")):
        got = draw(fast, prompt, **CFG)
        torch.testing.assert_close(got, without(fast, prompt=prompt, **CFG), rtol=1e-5, atol=1e-5)
        assert (capture.captures, capture.replays) == (1, 6 * number + 5)


@pytest.mark.parametrize(
    "kwargs", [{}, {"prompt": [SHORT, LONG], "negative_prompt": [LONG, " "], "true_cfg_scale": 4.0}]
)
def test_lengths_of_their_own(fast, capture, kwargs):
    """A graph for each has the bits of the pipeline without; masks of padded prompts are packed before."""
    fast.transformer.cuda_graphs = StepGraphs(4, capture, "one")
    for seed in (0, 1):
        assert torch.equal(draw(fast, seed=seed, **kwargs), without(fast, seed=seed, **kwargs))
    assert capture.captures == (2 if kwargs else 1)


def test_another_loop(capture, plain):
    from PIL import Image

    image = Image.new("RGB", (64, 48), "red")
    pipe = copy_of(plain, diffusers.QwenImageImg2ImgPipeline)
    accelerate(pipe)
    expected = draw(pipe, image=image, strength=0.9, **CFG)
    pipe.transformer.cuda_graphs = StepGraphs(4, capture, "any")
    torch.testing.assert_close(draw(pipe, image=image, strength=0.9, **CFG), expected, rtol=1e-5, atol=1e-5)
    assert capture.captures == 1


def add_hook(pipe):
    seen = []
    pipe.transformer.img_in.register_forward_hook(lambda *_: seen.append(1))
    return "img_in has a hook", lambda: len(seen) == 3


def other_layer(pipe):
    class Theirs(torch.nn.Linear):
        pass

    Theirs.__module__ = "quantiser"
    pipe.transformer.img_in.__class__ = Theirs
    return "img_in is a quantiser.Theirs", lambda: True


@pytest.mark.parametrize("change", [add_hook, other_layer])
def test_what_a_replay_would_pass_over(fast, capture, change, caplog):
    why, seen = change(fast)
    with caplog.at_level(logging.WARNING):
        draw(fast)
    assert capture.captures == 0 and seen()
    said = [r.message for r in caplog.records if "without CUDA graphs" in r.message]
    assert len(said) == 1 and why in said[0]


def test_only_calls_of_the_loop(fast, capture, monkeypatch, caplog):
    model = fast.transformer
    img, text = torch.randn(1, 12, model.config.in_channels), torch.randn(1, 3, model.config.joint_attention_dim)
    with torch.no_grad():
        model(img, text, timestep=torch.tensor([0.5]), img_shapes=[[(1, 4, 3)]])
    assert capture.captures == 0 and "not called by a pipeline's loop" in caplog.text
    monkeypatch.setattr("qwen_image_fast.drop_in.graphs.on_cuda", lambda t: False)
    draw(fast)
    assert capture.captures == 0 and "it is on cpu" in caplog.text


def test_weights_that_change_between_steps(fast, capture):
    """A layer that a callback replaces is captured anew, at the next step."""

    def replace(pipe, step, timestep, kwargs):
        if step == 0:
            layer = pipe.transformer.img_in
            layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)
        return kwargs

    before = fast.transformer.img_in.weight
    got = draw(fast, callback_on_step_end=replace)
    assert capture.captures == 2
    fast.transformer.img_in.weight = before
    torch.testing.assert_close(got, without(fast, callback_on_step_end=replace), rtol=1e-5, atol=1e-5)


def test_asked_for(plain, monkeypatch):
    pipe = copy_of(plain)
    with pytest.raises(ValueError, match="cuda_graphs must go with a GPU, and torch sees none here"):
        accelerate(pipe, cuda_graphs=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="cuda_graphs must be False without a pipeline"):
        accelerate(pipe.transformer, cuda_graphs=True)
    for name, value in (("parallel", "guidance=2"), ("memory_limit", "20GB")):
        with pytest.raises(ValueError, match=f"cuda_graphs must be False together with {name}"):
            monkeypatch.setattr("qwen_image_fast.drop_in.accelerate.streaming_device", lambda: torch.device("cpu"))
            accelerate(pipe, cuda_graphs=True, **{name: value})
    assert not hasattr(pipe.transformer, "cuda_graphs")
    report = accelerate(pipe, cuda_graphs=True)
    assert "captured as CUDA graphs" in str(report) and isinstance(pipe.transformer.cuda_graphs, StepGraphs)
    assert pickle.loads(pickle.dumps(pipe.transformer)).cuda_graphs is None
    restore(pipe)
    assert not hasattr(pipe.transformer, "cuda_graphs")
