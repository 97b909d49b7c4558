"""Adapters of PEFT on the stand-alone transformer: by its own methods, and by those of a pipeline around it."""

import functools

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("diffusers")

import peft
from accelerate_harness import assert_same, inputs, run
from called_harness import latents

import qwen_image_fast
from qwen_image_fast.models.lora import adapters_of
from qwen_image_fast.models.lora_files import parse_lora, read_lora


def adapted(model, name="default", **how):
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "img_mod.1"], init_lora_weights=False), name
    )
    return model


def test_adapters_are_saved_for_either_package_and_for_pipelines(both, tmp_path):
    theirs, ours = both
    plain = run(ours)
    expected = run(adapted(theirs))
    assert_same(run(adapted(ours)), expected)
    ours.save_lora_adapter(tmp_path)
    ours.unload_lora()
    assert torch.equal(run(ours), plain)
    theirs.unload_lora()
    theirs.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_same(run(theirs), expected)
    state, config = read_lora(tmp_path)
    adapters_of(ours).add("saved", parse_lora(state, ours, config))
    assert_same(run(ours), expected)
    with pytest.raises(ValueError, match="add_adapter: no LoRA of the pipeline may be active, got saved"):
        adapted(ours)


def test_an_adapter_on_released_modulation_is_not_hidden(tiny_folder):
    pipe = qwen_image_fast.QwenImagePipeline.from_pretrained(
        tiny_folder, torch_dtype=torch.float32, free_modulation_weights=True
    )
    call = functools.partial(pipe, "A", height=32, width=32, num_inference_steps=1, true_cfg_scale=1.0, seed=1)
    plain = call(output_type="latent").images[0]
    assert pipe.transformer.modulation_tables.freed
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["img_mod.1"], init_lora_weights=False))
    assert not pipe.transformer.modulation_tables.freed
    with pytest.raises(ValueError, match=r"img_mod.1 must be a plain Linear, got .*; take the adapter on it off first"):
        call()
    pipe.transformer.unload_lora()
    assert torch.equal(call(output_type="latent").images[0], plain)


def test_adapters_are_weighted_by_a_call(both):
    theirs, ours = map(adapted, both)
    for scale in (0.0, 0.5, 1.0):
        assert_same(run(ours, attention_kwargs={"scale": scale}), run(theirs, attention_kwargs={"scale": scale}))


def test_adapters_train(both):
    for model in both:
        model.requires_grad_(False)
        adapted(model)(**inputs()).sample.square().mean().backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in both]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_what_adapters_refuse(pipe, tmp_path):
    model = pipe.transformer
    for name in ("x.bin", "x.pt"):
        with pytest.raises(ValueError, match="load_lora_adapter: the file must be safetensors, as pickles are never"):
            model.load_lora_adapter(tmp_path, weight_name=name)
    with pytest.raises(ValueError, match="save_lora_adapter: safe_serialization must be True"):
        model.save_lora_adapter(tmp_path, safe_serialization=False)
    adapted(model)
    with pytest.raises(ValueError, match="save_pretrained: adapters of PEFT are in the place of layers"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="load_lora_weights: adapters of PEFT are in the place of layers"):
        pipe.load_lora_weights({})
    model.unload_lora()
    model.save_pretrained(tmp_path / "model")


# ---- by the methods of a pipeline ------------------------------------------------------------------------------------


@pytest.fixture
def with_two(pipe):
    """A pipeline whose transformer has two adapters, the first active; latents without, with each, and with both."""
    model, found = pipe.transformer, {"none": latents(pipe)}
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        model.add_adapter(config, name)
    for names in (["a"], ["b"], ["a", "b"]):
        model.set_adapters(names)
        found["".join(names)] = latents(pipe)
    model.set_adapters("a")
    assert len({t.double().sum().item() for t in found.values()}) == 4
    return pipe, found


def test_a_pipeline_names_and_chooses_them(with_two):
    pipe, found = with_two
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]} and pipe.get_active_adapters() == ["a"]
    pipe.set_adapters(["a", "b"], [1.0, 1.0])
    assert torch.equal(latents(pipe), found["ab"]) and pipe.get_active_adapters() == ["a", "b"]
    pipe.set_adapters("b")
    assert torch.equal(latents(pipe), found["b"])
    with pytest.raises(ValueError, match=r"adapters must be of those that are there \(a, b\), got c"):
        pipe.set_adapters("c")
    with pytest.raises(ValueError, match=r"adapters must be of those that are there \(a, b\), got c"):
        pipe.delete_adapters("c")


def test_a_pipeline_disables_and_scales_them(with_two):
    pipe, found = with_two
    pipe.disable_lora()
    assert torch.equal(latents(pipe), found["none"])
    pipe.enable_lora()
    assert torch.equal(latents(pipe), found["a"])
    assert_same(latents(pipe, attention_kwargs={"scale": 0.0}), found["none"])
    assert torch.equal(latents(pipe), found["a"])
    pipe.set_adapters("a", 0.5)
    half = latents(pipe)
    pipe.set_adapters("a", 1.0)
    assert_same(latents(pipe, attention_kwargs={"scale": 0.5}), half)


def test_a_pipeline_fuses_and_forgets_them(with_two):
    pipe, found = with_two
    pipe.fuse_lora()
    assert pipe.fused_loras == {"a"} and pipe.num_fused_loras == 1
    assert_same(latents(pipe), found["a"])
    pipe.unfuse_lora()
    assert pipe.fused_loras == set()
    assert_same(latents(pipe), found["a"])
    pipe.delete_adapters("a")
    pipe.set_adapters("b")
    assert pipe.get_list_adapters() == {"transformer": ["b"]}
    assert_same(latents(pipe), found["b"])
    pipe.unload_lora_weights()
    assert not pipe.transformer.has_peft_layers and pipe.get_list_adapters() == {"transformer": []}
    assert_same(latents(pipe), found["none"])
