"""Transformers with weights in 4 bits: how far from float they are, files, gradients, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_int8_linear import distance, inputs, run

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.models.int8_linear import Int8Linear, quantised
from qwen_image_fast.models.precision import mean_bytes, precisions
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

NAME, LAST = "transformer_blocks.0.attn.to_q", "transformer_blocks.4.attn.to_q"


def load(folder=SHIPPED, **options):
    where = {"subfolder": "transformer"} if folder == SHIPPED else {}
    return QwenImageTransformer2DModel.from_pretrained(folder, **where, **options)


def test_the_velocity():
    """Of a picture of the model's own at three noise levels, and that of the same prompt."""
    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    call = {"height": 128, "width": 128, "num_inference_steps": 4, "true_cfg_scale": 1.0, "output_type": "latent"}
    clean = torch.as_tensor(pipe("a red circle", seed=1, progress=False, **call).images).reshape(1, 64, 64)
    embeds, exact = pipe.encode_prompt("a red circle")[0].expand(2, -1, -1), pipe.transformer
    small, errors = load(torch_dtype=torch.float32, precision="int4"), []
    assert small.get_submodule(NAME).int8.four and not small.get_submodule(LAST).int8.four
    assert small.get_memory_footprint() < 0.9 * load(torch_dtype=torch.float32, precision="int8").get_memory_footprint()
    for sigma in (0.95, 0.7, 0.4):
        given = inputs(torch.float32, sigma, clean) | {
            "encoder_hidden_states": embeds, "encoder_hidden_states_mask": None,
        }  # fmt: skip
        with torch.no_grad():
            errors.append(distance(small(**given).sample, exact(**given).sample))
    assert all(0.02 < error < most for error, most in zip(errors, MOST)), errors


MOST = (0.09, 0.09, 0.11)


def test_saved_and_read_again(tmp_path):
    model = load(torch_dtype=torch.float32, precision="int4")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert state[f"{LAST}.weight"].shape == (192, 192) and state[f"{LAST}.weight_scale"].shape == (192, 1)
    assert state[f"{NAME}.weight"].shape == (192, 96) and state[f"{NAME}.weight_s_rel"].shape == (192, 12)
    config = {"format": "asym_w4a8_int8", "group_size": 16, "convrot": True, "convrot_groupsize": 64}
    assert json.loads(bytes(state[f"{NAME}.comfy_quant"].tolist())) == config
    again = load(tmp_path, torch_dtype=torch.float32, precision="int4")
    assert torch.equal(run(again), run(model))
    floats = load(tmp_path, torch_dtype=torch.float32)  # as any reader of the format decodes it
    assert type(floats.get_submodule(NAME)) is torch.nn.Linear
    dequantised = model.get_submodule(NAME).dequantised()
    torch.testing.assert_close(floats.get_submodule(NAME).weight, dequantised, rtol=1e-5, atol=1e-6)
    other = load(torch_dtype=torch.float32, precision="int4")
    other.get_submodule(NAME).scale_bits.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))
    state[f"{NAME}.weight_codebook"] *= 1.01
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=f"{NAME} is in 4 bits of another codebook: load it without precision"):
        load(tmp_path, precision="int4")


def test_a_file_whose_last_block_is_in_4_bits_is_taken_as_it_is(tmp_path):
    model = load(torch_dtype=torch.float32, precision="int4")
    layer = model.get_submodule(LAST)
    model.transformer_blocks[4].attn.to_q = Int8Linear(quantised(layer.dequantised(), precision="int4"), layer.bias)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, torch_dtype=torch.float32, precision="int4")
    assert again.get_submodule(LAST).int8.four and not again.transformer_blocks[4].attn.to_k.int8.four
    assert torch.equal(run(again), run(model))
    with pytest.raises(ValueError, match="is quantised already, transformer_blocks.* as int4 groups of 16"):
        load(tmp_path, precision="int8")


def test_the_only_block_is_in_4_bits():
    assert precisions([NAME], "int4") == {NAME: "int4"} and mean_bytes("int4", 1) == 9 / 16
    assert precisions([NAME, LAST], "int4") == {NAME: "int4", LAST: "int8"}
    assert precisions([NAME, LAST], "int8") == {NAME: "int8", LAST: "int8"}
    assert mean_bytes("int4", 2) == (9 / 16 + 1) / 2


def test_gradients_and_adapters_as_in_8_bits():
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    layer = Int8Linear(quantised(weight, precision="int4"), None)
    assert distance(layer.dequantised(), weight) < 0.08
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(1), requires_grad=True)
    layer(x).sum().backward()
    assert distance(x.grad, torch.ones(5, 64) @ layer.dequantised()) < 1e-6
    assert distance(layer.in_floats(x, None), x @ layer.dequantised().T) < 1e-6
    with pytest.raises(ValueError, match="int4: the inputs of a layer must be a multiple of 16, got 24"):
        quantised(torch.randn(4, 24), precision="int4")
