"""The text encoder's part of LoRA files: styles of keys, and that it goes with the transformer's part."""

import json

import pytest
import torch
from loras import LAYERS, draw, pairs, state
from safetensors.torch import save_file

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.models.lora import LoraLinear


@pytest.fixture
def pipe(tiny_folder):
    return QwenImagePipeline.from_pretrained(tiny_folder)


TEXT_STYLES = {
    "diffusers": (
        "text_encoder.model.language_model.{}.lora_A.weight",
        "text_encoder.model.language_model.{}.lora_B.weight",
    ),
    "older transformers": ("text_encoder.model.{}.lora_A.weight", "text_encoder.model.{}.lora_B.weight"),
    "bare": ("text_encoder.{}.lora_A.weight", "text_encoder.{}.lora_B.weight"),
    "comfy": (
        "text_encoders.qwen25_7b.transformer.model.{}.lora_A.weight",
        "text_encoders.qwen25_7b.transformer.model.{}.lora_B.weight",
    ),
    "kohya": ("lora_te_model_{}.lora_down.weight", "lora_te_model_{}.lora_up.weight"),
    "kohya, te1": ("lora_te1_{}.lora_down.weight", "lora_te1_{}.lora_up.weight"),
    "lycoris": ("lycoris_te_{}.lora_down.weight", "lycoris_te_{}.lora_up.weight"),
}
TEXT_LAYERS = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]


def text_state(pipe, style):
    torch.manual_seed(7)
    out, flat = {}, style not in ("diffusers", "older transformers", "bare", "comfy")
    for name in TEXT_LAYERS:
        layer = pipe.text_encoder.get_submodule(f"language_model.{name}")
        a, b = torch.randn(2, layer.in_features) / 4, torch.randn(layer.out_features, 2) / 4
        keys = (key.format(name.replace(".", "_") if flat else name) for key in TEXT_STYLES[style])
        out |= dict(zip(keys, (a, b)))
    return out


@pytest.mark.parametrize("style", TEXT_STYLES)
def test_text_encoders_part(pipe, style):
    """It is applied, weighted, switched off, fused and forgotten with the transformer's."""
    text, whole = text_state(pipe, style), state(pairs(pipe, LAYERS[:1]), "kohya" if "kohya" in style else "diffusers")
    layers = [pipe.text_encoder.get_submodule(f"language_model.{name}") for name in TEXT_LAYERS]
    weights = [layer.weight.clone() for layer in layers]
    (a, b), before = list(text.values())[:2], draw(pipe)
    pipe.load_lora_weights(whole, "own")
    own = draw(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights({**whole, **text}, "both")
    assert pipe.get_list_adapters() == {"transformer": ["both"], "text_encoder": ["both"]}
    both = draw(pipe)
    assert (both - own).abs().max() > 1e-3 and (own - before).abs().max() > 1e-3
    mix = layers[0].mix
    torch.testing.assert_close(mix[1] @ mix[0], b @ a)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), before)
    pipe.enable_lora()
    pipe.fuse_lora()
    torch.testing.assert_close(layers[0].weight, weights[0] + b @ a)
    torch.testing.assert_close(draw(pipe), both, rtol=0, atol=5e-5)
    pipe.unfuse_lora()
    pipe.load_lora_weights(whole, "both", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["both"]}
    torch.testing.assert_close(draw(pipe), own, rtol=0, atol=5e-5)
    pipe.unload_lora_weights()
    assert all(type(layer) is torch.nn.Linear for layer in layers)


def test_text_encoders_part_alone_and_without_one(pipe, caplog):
    text, whole = text_state(pipe, "kohya"), state(pairs(pipe))
    pipe.load_lora_weights(text, "text")
    assert pipe.get_active_adapters() == ["text"] and not any(type(m) is LoraLinear for m in pipe.transformer.modules())
    with pytest.raises(ValueError, match="layers of Qwen2_5_VLModel, got layers_9_self_attn_q_proj.lora_up.weight"):
        pipe.load_lora_weights({**whole, "lora_te_layers_9_self_attn_q_proj.lora_up.weight": torch.ones(2, 2)})
    pipe.unload_lora_weights()
    unused = {f"lora_te_{name}.lora_up.weight": torch.ones(2, 2) for name in ("visual_blocks_0_attn_qkv", "lm_head")}
    pipe.load_lora_weights({**text, **unused}, "text")
    assert "2 tensors for parts of the text encoder are left out" in caplog.text
    assert len(pipe.transformer._lora.loaded["text"]) == len(TEXT_LAYERS)
    pipe.unload_lora_weights()
    encoder, pipe.text_encoder = pipe.text_encoder, None
    pipe.load_lora_weights({**whole, **text}, "whole")
    assert "4 tensors for the text encoder are left out, as this pipeline runs without" in caplog.text
    assert len(pipe.transformer._lora.loaded["whole"]) == len(LAYERS)
    pipe.text_encoder = encoder


def test_metadata_of_two_models(pipe, tmp_path):
    metadata = {"transformer.r": 4, "transformer.lora_alpha": 12, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    both = {**state(pairs(pipe)), **text_state(pipe, "diffusers")}
    save_file(both, tmp_path / "m.safetensors", metadata={"lora_adapter_metadata": json.dumps(metadata)})
    pipe.load_lora_weights(tmp_path, adapter_name="m")
    scales = {name.split(".")[0]: adapter.scale for name, adapter in pipe.transformer._lora.loaded["m"].items()}
    assert scales == {"transformer_blocks": 3.0, "text_encoder": 0.5}
