"""The drop-in on diffusers' modular pipelines: the same images, with the models that they share accelerated."""

import copy
import importlib

import diffusers
import numpy as np
import pytest
import torch
from reference import picture, reference
from test_layered import models, rgba

from qwen_image_fast import accelerate, restore
from qwen_image_fast.drop_in.transformer import FastTransformer
from qwen_image_fast.tiny import tiny_configs


@pytest.fixture(scope="module")
def components(edit_folder):
    return reference("QwenImageEditPlusPipeline", edit_folder).components


@pytest.fixture
def small_modular(monkeypatch):
    """diffusers' sizes, 64 times smaller."""
    module = importlib.import_module("diffusers.modular_pipelines.qwenimage.encoders")
    full = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: full(area / 64, ratio))


def controlnet():
    config = {k: v for k, v in tiny_configs()["transformer"].items() if k != "guidance_embeds"}
    torch.manual_seed(0)
    net = diffusers.QwenImageControlNetModel(**{**config, "num_layers": 2}).eval()
    for block in net.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.05)
    return net


SIZE = {"height": 48, "width": 64}
CALLS = {
    "text to image": ("", lambda: SIZE),
    "image to image": ("", lambda: {**SIZE, "image": picture(64, 48), "strength": 0.6}),
    "inpainting": ("", lambda: {**SIZE, "image": picture(64, 48), "mask_image": picture(64, 48, 1).convert("L")}),
    "ControlNet": ("", lambda: {**SIZE, "control_image": picture(64, 48)}),
    "edit": ("Edit", lambda: {"image": picture(64, 48)}),
    "edit inpainting": ("Edit", lambda: {"image": picture(64, 48), "mask_image": picture(64, 48, 1).convert("L")}),
    "edit with two references": ("EditPlus", lambda: {"image": [picture(64, 48), picture(40, 60, 1)]}),
    "layers": ("Layered", lambda: {"image": rgba(64, 48), "layers": 2}),
}


@pytest.mark.parametrize(("name", "call"), CALLS.values(), ids=CALLS.keys())
def test_images_equal_diffusers(components, small_modular, name, call):
    pipe, call = getattr(diffusers, f"QwenImage{name}ModularPipeline")(), call()
    known = {spec.name for spec in pipe._component_specs.values()}
    parts = {**components, **({"controlnet": controlnet()} if "control_image" in call else {})}
    if name == "Layered":
        parts |= {part: pair[1] for part, pair in models().items()}
    shared = ("tokenizer", "processor")
    kind, tolerance = ("pil", 1.01 / 255) if "mask_image" in call else ("pt", 5e-5)  # diffusers pastes PIL images only
    pipe.update_components(**{k: v if k in shared else copy.deepcopy(v) for k, v in parts.items() if k in known})

    def draw():
        images = pipe(
            prompt="a cat", negative_prompt="bad", num_inference_steps=2, output="images", output_type=kind,
            generator=torch.Generator().manual_seed(0), **call,
        )  # fmt: skip
        images = list(images[0] if name == "Layered" else images)
        return torch.stack([i if kind == "pt" else torch.from_numpy(np.asarray(i) / 255) for i in images])

    expected = draw()
    report = accelerate(pipe)
    assert len(report.replaced) == 2 and isinstance(pipe.transformer, FastTransformer)
    left = ["pipeline", *(["controlnet"] if "control_image" in call else [])]
    assert [what for what, _ in report.left_alone] == left
    assert expected.std() > 0.05
    torch.testing.assert_close(draw(), expected, rtol=0, atol=tolerance)
    restore(pipe)
    assert torch.equal(draw(), expected)
