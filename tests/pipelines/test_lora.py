"""LoRA on our pipelines against diffusers and PEFT with the same files, and swapping without leaks."""

import gc

import pytest
import torch
import torch._dynamo.testing
from loras import CALL, LAYERS, MODULATION, TIME_STEP, draw, pairs, state
from reference import reference, seeded

from qwen_image_fast import QwenImageControlNetModel, QwenImagePipeline
from qwen_image_fast.models.lora import LoraLinear
from qwen_image_fast.schedulers import named_schedule


@pytest.fixture
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


def test_several_with_weights_equal_diffusers(pipe, tiny_folder):
    theirs = reference("QwenImagePipeline", tiny_folder)
    for seed, name in enumerate("ab"):
        lora = state(pairs(pipe, MODULATION if name == "b" else LAYERS, seed=seed))
        theirs.load_lora_weights(dict(lora), adapter_name=name)
        pipe.load_lora_weights(lora, adapter_name=name)
    for names, weights in ((["a", "b"], [0.7, -0.3]), (["b"], [1.0]), (["a", "b"], [1.0, 1.0])):
        theirs.set_adapters(names, weights)
        pipe.set_adapters(names, weights)
        assert pipe.get_active_adapters() == names
        expected = theirs(**CALL, generator=seeded(0)).images
        torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("scale", [0.0, 0.3, 2])
def test_scale_of_a_call_is_diffusers(pipe, tiny_folder, scale):
    """On top of the adapters' own weights, and gone after the call."""
    theirs = reference("QwenImagePipeline", tiny_folder)
    for p in (pipe, theirs):
        p.load_lora_weights(state(pairs(pipe)), adapter_name="a")
        p.set_adapters("a", 0.7)
    plain = draw(pipe)
    expected = theirs(**CALL, generator=seeded(0), attention_kwargs={"scale": scale}).images
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(draw(pipe, attention_kwargs={"scale": scale}), expected, rtol=0, atol=5e-5)
    assert torch.equal(draw(pipe), plain) and pipe.attention_kwargs is None
    pipe.disable_lora()
    draw(pipe, attention_kwargs={"scale": scale})
    pipe.enable_lora()
    assert torch.equal(draw(pipe), plain)


def test_scale_where_it_could_not_be_kept(pipe):
    """A block that is computed again for its gradient would have another scale; a ControlNet has no LoRA."""
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="attention_kwargs must be None with gradient checkpointing"):
        pipe.transformer(None, attention_kwargs={"scale": 0.5})
    net = QwenImageControlNetModel.from_transformer(pipe.transformer, num_layers=1)
    with pytest.raises(ValueError, match="joint_attention_kwargs must be None"):
        net(None, None, joint_attention_kwargs={"scale": 0.5})


def test_scale_after_an_error_or_without_a_lora(pipe, caplog):
    plain = draw(pipe)
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 0.5}), plain)
    assert "scale has no effect, as no LoRA is active" in caplog.text
    pipe.load_lora_weights(state(pairs(pipe)))
    changed = draw(pipe)

    def stop(pipe, step, time, given):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        draw(pipe, attention_kwargs={"scale": 0.5}, callback_on_step_end=stop)
    assert torch.equal(draw(pipe), changed) and not torch.equal(changed, plain)


def test_fuse_and_unfuse(pipe):
    before = draw(pipe)
    for seed, name in enumerate("ab"):
        pipe.load_lora_weights(state(pairs(pipe, MODULATION, seed=seed)), adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    expected = draw(pipe)
    pipe.fuse_lora()
    assert pipe.get_active_adapters() == [] and type(pipe.transformer.norm_out.linear) is torch.nn.Linear
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="adapters must not be fused, got a; unfuse them first"):
        pipe.set_adapters("a")
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["a", "b"]
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=5e-5)
    pipe.fuse_lora(lora_scale=2.0, adapter_names=["a"])
    pipe.unfuse_lora()
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=5e-5)


@pytest.mark.parametrize("layers", [MODULATION[-2:], TIME_STEP], ids=["modulation", "time step"])
def test_modulation_tables_follow_the_adapter(pipe, tiny_folder, layers):
    """Tables of a schedule are kept; a LoRA on what makes them must not meet those without it."""
    before = draw(pipe)
    pipe.load_lora_weights(state(pairs(pipe, layers)), adapter_name="a")
    theirs = reference("QwenImagePipeline", tiny_folder)
    theirs.load_lora_weights(state(pairs(pipe, layers)))
    torch.testing.assert_close(draw(pipe), theirs(**CALL, generator=seeded(0)).images, rtol=0, atol=5e-5)
    changed = draw(pipe)
    assert (changed - before).abs().max() > 1e-3 and torch.equal(draw(pipe), changed)
    pipe.set_adapters("a", 0.5)
    assert not torch.equal(draw(pipe), changed)
    pipe.fuse_lora(lora_scale=2.0)
    torch.testing.assert_close(draw(pipe), changed, rtol=0, atol=5e-5)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=5e-5)


@pytest.mark.parametrize("layers", [MODULATION, TIME_STEP], ids=["modulation", "time step"])
@pytest.mark.parametrize("change", ["fused", "fused and forgotten", "unfused", "active", "switched off"])
def test_adapters_on_released_modulation_weights(tiny_folder, pipe, layers, change):
    """What was fused is there again when another schedule, or saving, reads the weights from the folder."""
    freed = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    for p in (freed, pipe):
        for seed, name in enumerate("ab"):
            p.load_lora_weights(state(pairs(pipe, layers, seed=seed)), adapter_name=name)
        if change != "active":
            draw(p)
        if "fused" in change:
            p.fuse_lora()
        draw(p)
        if change == "fused and forgotten":
            p.delete_adapters("a")
        elif change == "unfused":
            p.unfuse_lora()
        elif change == "switched off":
            p.disable_lora()
    for steps in (2, 3):
        expected = draw(pipe, num_inference_steps=steps)
        torch.testing.assert_close(draw(freed, num_inference_steps=steps), expected, rtol=0, atol=5e-5)
    assert freed.transformer.modulation_tables.freed
    saved = freed.transformer.state_dict()
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-5)


def test_freed_modulation_weights_come_back_for_an_adapter(tiny_folder, pipe):
    freed = QwenImagePipeline.from_pretrained(tiny_folder, free_modulation_weights=True)
    draw(freed)
    freed.load_lora_weights(state(pairs(pipe)))
    assert freed.transformer.modulation_tables.freed  # an adapter elsewhere does not need them
    freed.unload_lora_weights()
    lora = state(pairs(pipe, MODULATION))
    for p in (freed, pipe):
        p.load_lora_weights(lora)
        p.fuse_lora()
    assert torch.equal(draw(freed), draw(pipe))


def test_swapping_leaves_nothing(pipe):
    before, keys = draw(pipe), list(pipe.transformer.state_dict())
    every = [n for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    loras = [state(pairs(pipe, every, rank=8, seed=seed)) for seed in range(2)]
    for k in range(2):
        pipe.load_lora_weights(loras[k], adapter_name=str(k))
    pipe.set_adapters("0")
    expected = draw(pipe)

    def tensors():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))

    before_swaps = tensors()
    for k in range(100):
        pipe.set_adapters(str((k + 1) % 2))
    assert tensors() == before_swaps and torch.equal(draw(pipe), expected)
    counts = []
    for k in range(1, 21):  # from new tensors each time
        pipe.load_lora_weights({key: t.clone() for key, t in loras[k % 2].items()}, "0", hotswap=True)
        counts.append(tensors())
    assert len(set(counts)) == 1 and pipe.get_active_adapters() == ["0"] and torch.equal(draw(pipe), expected)
    assert list(pipe.transformer.state_dict()) == keys
    pipe.delete_adapters("1")
    assert pipe.get_list_adapters() == {"transformer": ["0"]}
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)
    assert not any(type(m) is LoraLinear for m in pipe.transformer.modules())


def test_switching_off_and_on_and_another_file_in_its_place(pipe):
    before, (a, b) = draw(pipe), (state(pairs(pipe, seed=seed)) for seed in range(2))
    pipe.load_lora_weights(a, "x")
    pipe.set_adapters("x", 0.5)
    half = draw(pipe)
    pipe.disable_lora()
    pipe.disable_lora()
    assert torch.equal(draw(pipe), before) and pipe.get_active_adapters() == []
    pipe.enable_lora()
    assert torch.equal(draw(pipe), half)
    pipe.load_lora_weights(b, "x", hotswap=True)
    other = draw(pipe)
    assert not torch.equal(other, half)
    pipe.disable_lora()
    pipe.load_lora_weights(a, "x", hotswap=True)
    assert torch.equal(draw(pipe), before)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), half)
    pipe.disable_lora()
    pipe.delete_adapters("x")
    pipe.enable_lora()
    assert torch.equal(draw(pipe), before)


def test_swapping_recompiles_nothing(pipe):
    """Adapters of one rank on one set of layers are inputs of the compiled code."""
    for seed, name in enumerate("ab"):
        pipe.load_lora_weights(state(pairs(pipe, seed=seed)), adapter_name=name)
    expected = []
    for name in "ab":
        pipe.set_adapters(name)
        expected.append(draw(pipe))
    counter = torch._dynamo.testing.CompileCounter()
    pipe.transformer.forward_packed = torch.compile(pipe.transformer.forward_packed, backend=counter)
    compiled = []
    for k in (0, 1, 0):
        pipe.set_adapters("ab"[k])
        torch.testing.assert_close(draw(pipe), expected[k], rtol=0, atol=1e-5)
        compiled.append(counter.frame_count)
    assert compiled[0] > 0 and len(set(compiled)) == 1


def test_moving_and_casting_take_the_adapter_along(pipe):
    pipe.load_lora_weights(state(pairs(pipe)))
    pipe.to(torch.bfloat16)
    assert pipe.transformer.get_submodule(LAYERS[0]).mix[0].dtype == torch.bfloat16
    assert draw(pipe).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "steps"), [("lightning-4", 4), ("lightning-8", 8)])
def test_lightning_by_name(pipe, name, steps):
    arguments = pipe.use_schedule(name)
    assert arguments == {"num_inference_steps": steps, "true_cfg_scale": 1.0} == named_schedule(name)[1]
    pipe(**{**CALL, **arguments, "height": 64}, progress=False)
    expected = {4: [1, 0.9, 0.75, 0.5, 0], 8: [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]}
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(expected[steps]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="name must be one of lightning-4, lightning-8, got 'turbo'"):
        pipe.use_schedule("turbo")
