"""A LoRA of ours draws the same pictures in training, in our pipelines, in diffusers and by ComfyUI's names."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_image_fast import QwenImagePipeline
from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.training.lora import add_lora, for_comfyui, lora_state, save_lora_file
from qwen_image_fast.training.randomness import normal
from qwen_image_fast.training.recipe.flow import LoraRecipe

PROMPT = '"SUN" in red on a white ground'
CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "true_cfg_scale": 1.0, "output_type": "np"}


def picture(pipe, **seed):
    return (np.asarray(pipe(PROMPT, **CALL, **seed).images[0]) * 255).round().astype(int)


@pytest.fixture(scope="module", params=["lora", "dora", "lokr"])
def trained(request, tmp_path_factory):
    """The file of an adapter whose every tensor counts, and the picture that the model in training draws with it."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = LoraRecipe(rank=4, alpha=6.0, kind=request.param, targets=["attention"], ranks={"to_k": 2})
    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    plain = picture(pipe, seed=3, progress=False)
    add_lora(pipe.transformer, recipe, seed=1)
    with torch.no_grad():
        for name, tensor in lora_state(pipe.transformer).items():
            if not tensor.any():  # what begins at zero, so that the layer begins without a change
                tensor.copy_(0.2 * normal(tuple(tensor.shape), 0, name))
    drawn = picture(pipe, seed=3, progress=False)
    assert np.abs(drawn - plain).max() > 30
    return request.param, save_lora_file(pipe.transformer, folder / "ours.safetensors"), drawn


@pytest.mark.parametrize("names", ["diffusers", "comfyui"])
def test_our_pipelines_draw_what_training_drew(trained, tmp_path, names):
    _, file, drawn = trained
    if names == "comfyui":
        state = for_comfyui(load_file(file))
        assert all(name.startswith("diffusion_model.") and ".lora_A" not in name for name in state)
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()}, file := tmp_path / "comfyui.safetensors"
        )
    pipe = QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    pipe.load_lora_weights(file)
    assert np.abs(picture(pipe, seed=3, progress=False) - drawn).max() <= 1


def test_diffusers_draws_what_training_drew(trained):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    kind, file, drawn = trained
    if kind == "lokr":
        pytest.skip("diffusers reads no LoKr by these names")
    pipe = diffusers.QwenImagePipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    made = picture(pipe, generator=torch.Generator().manual_seed(3))
    assert np.abs(made - drawn).max() <= 1
