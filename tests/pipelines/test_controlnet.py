"""ControlNets against diffusers' model and pipelines with the same weights and seed."""

from inspect import signature

import diffusers
import numpy as np
import pytest
import torch
from reference import assert_errs_at_most_twice_as_much, picture, reference, seeded, take_mode
from test_start import speck, white_box

import qwen_image_fast
from qwen_image_fast import (
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageMultiControlNetModel,
)
from qwen_image_fast.tiny import tiny_configs

PROMPTS = ["a red house", "two cats by the sea, in the evening"]
SIZES = [(64, 64), (96, 32), (32, 80), (80, 48)]
SIZE = {"width": 64, "height": 48, "num_inference_steps": 3, "output_type": "latent"}


def config(extra=0, layers=2):
    sizes = {k: v for k, v in tiny_configs()["transformer"].items() if k != "guidance_embeds"}
    return {**sizes, "num_layers": layers, "extra_condition_channels": extra}


def nets(extra=0, layers=2, seed=0, dtype=torch.float32):
    """Ours and diffusers', every weight random, so that the residuals are not zero."""
    torch.manual_seed(seed)
    mine = QwenImageControlNetModel(**config(extra, layers)).eval()
    for p in mine.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    theirs = diffusers.QwenImageControlNetModel(**config(extra, layers)).eval()
    theirs.load_state_dict(mine.state_dict())
    return mine.to(dtype), theirs.to(dtype)


@pytest.fixture(scope="module")
def union():
    return nets()


@pytest.fixture(scope="module")
def pair(edit_folder, union):
    mine = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=union[0])
    return mine, reference("QwenImageControlNetPipeline", edit_folder, controlnet=union[1])


def ours(pipe, **call):
    return pipe(**{**SIZE, "progress": False, **call}).images


@pytest.mark.parametrize("masked", [False, True])
def test_the_model_equals_diffusers(union, masked):
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 12, 64), "controlnet_cond": torch.randn(2, 12, 64),
        "encoder_hidden_states": torch.randn(2, 7, 128), "timestep": torch.tensor([0.3, 0.3]),
        "img_shapes": [[(1, 3, 4)]] * 2, "conditioning_scale": 0.7,
    }  # fmt: skip
    if masked:
        inputs["encoder_hidden_states_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    mine, theirs = union
    with torch.no_grad():
        expected = theirs(**inputs).controlnet_block_samples
        got = mine(**inputs).controlnet_block_samples
    assert len(got) == len(expected) == 2 and expected[0].std() > 0.1
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert torch.equal(mine(**inputs, return_dict=False)[1], mine(**inputs).controlnet_block_samples[1])
    with torch.no_grad():
        compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)(**inputs).controlnet_block_samples
    for a, b in zip(compiled, got):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


CALLS = {
    "one": {},
    "guidance": {"negative_prompt": "bad"},
    "scale": {"controlnet_conditioning_scale": 0.4, "negative_prompt": "bad"},
    "part of the steps": {"control_guidance_start": 0.3, "control_guidance_end": 0.7},
    "square": {"width": 64, "height": 64},
    "tall": {"width": 32, "height": 80},
    "odd": {"width": 80, "height": 48, "control_image": picture(61, 37)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_latents_equal_diffusers(pair, call):
    call = {**SIZE, "prompt": PROMPTS[0], "control_image": picture(80, 60), **call}
    expected = pair[1](**call, generator=seeded(7)).images
    torch.testing.assert_close(ours(pair[0], **call, seed=7), expected, rtol=0, atol=5e-5)
    without = ours(pair[0], **{**call, "controlnet_conditioning_scale": 0.0}, seed=7)
    assert (without - expected).abs().max() > 1e-3


def test_several_pictures_for_a_union_net(edit_folder, union):
    mine = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=union[0])
    multi = diffusers.QwenImageMultiControlNetModel([union[1]])
    theirs = reference("QwenImageControlNetPipeline", edit_folder, controlnet=multi)
    call = {**SIZE, "prompt": PROMPTS[0], "control_image": [picture(64, 48), picture(64, 48, 1)],
            "controlnet_conditioning_scale": [0.5, 0.8], "negative_prompt": " "}  # fmt: skip
    expected = theirs(**call, generator=seeded(7)).images
    torch.testing.assert_close(ours(mine, **call, seed=7), expected, rtol=0, atol=5e-5)


def test_several_nets_as_one_model(edit_folder, union):
    """diffusers' class: of a single net any number of pictures, in the pipeline and alone; of several one for each."""
    pictures = [picture(64, 48), picture(64, 48, 1)]
    mine, theirs = (
        cls([net]) for cls, net in zip((QwenImageMultiControlNetModel, diffusers.QwenImageMultiControlNetModel), union)
    )
    pipes = (
        QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=mine),
        reference("QwenImageControlNetPipeline", edit_folder, controlnet=theirs),
    )
    assert pipes[0].controlnet is mine and (mine.dtype, mine.device.type) == (torch.float32, "cpu")
    call = {**SIZE, "prompt": PROMPTS[0], "controlnet_conditioning_scale": [0.5, 0.8]}
    for own in (pictures, pictures[:1]):
        call |= {"control_image": own, "controlnet_conditioning_scale": [0.5, 0.8][: len(own)]}
        torch.testing.assert_close(
            ours(pipes[0], **call, seed=7), pipes[1](**call, generator=seeded(7)).images, rtol=0, atol=5e-5
        )
    torch.manual_seed(1)
    given = {
        "hidden_states": torch.randn(1, 12, 64), "controlnet_cond": [torch.randn(1, 12, 64), torch.randn(1, 12, 64)],
        "encoder_hidden_states": torch.randn(1, 7, 128), "timestep": torch.tensor([0.3]),
        "img_shapes": [[(1, 3, 4)]], "conditioning_scale": [0.7, 0.2],
    }  # fmt: skip
    with torch.no_grad():
        expected = theirs(**given, return_dict=False)
        several = QwenImageMultiControlNetModel([union[0], nets()[0]])
        for got in (mine(**given).controlnet_block_samples, several(**given, return_dict=False)):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="one entry for each of 2 nets, or any number for a single one, got 1 and 1"):
        several(**{**given, "controlnet_cond": given["controlnet_cond"][:1], "conditioning_scale": [1.0]})
    with pytest.raises(ValueError, match="controlnets must be one or several, got none"):
        QwenImageMultiControlNetModel([])
    with pytest.raises(TypeError, match="must be of this package's QwenImageControlNetModel, got diffusers"):
        QwenImageMultiControlNetModel([union[1]])


def test_several_nets_add_up(edit_folder, union):
    """The same net twice is the union net with two pictures."""
    call = {"prompt": PROMPTS[0], "control_image": [picture(64, 48), picture(64, 48, 1)], "seed": 3}
    one = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=union[0])
    two = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=[union[0], nets()[0]])
    torch.testing.assert_close(ours(two, **call), ours(one, **call), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["a union net", "several nets"])
def test_several_controls_of_several_prompts(edit_folder, union, kind):
    """An entry for each control, in which every prompt has a picture of its own or shares one."""
    net = union[0] if kind == "a union net" else [union[0], nets(seed=1)[0]]
    pipe = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=net)
    depth, (first, second) = picture(200, 30), (picture(64, 48, 1), picture(20, 50, 2))
    call = {"controlnet_conditioning_scale": [0.5, 0.8], "num_inference_steps": 2}
    batch = ours(pipe, prompt=PROMPTS, control_image=[depth, [first, second]], width=[64, 32], height=[48, 80],
                 seed=[5, 6], **call)  # fmt: skip
    for k, (own, width, height) in enumerate(((first, 64, 48), (second, 32, 80))):
        alone = ours(pipe, prompt=PROMPTS[k], control_image=[depth, own], width=width, height=height, seed=5 + k,
                     **call)  # fmt: skip
        torch.testing.assert_close(batch[k], alone[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inpainting_equals_diffusers(edit_folder, size):
    """diffusers draws the picture's latents from the global generator: both take the mode here."""
    mine, theirs = nets(extra=4)
    mine = QwenImageControlNetInpaintPipeline.from_pretrained(edit_folder, controlnet=mine)
    theirs = reference("QwenImageControlNetInpaintPipeline", edit_folder, controlnet=theirs)
    for pipe in (mine, theirs):
        take_mode(pipe)
    call = {"control_image": picture(80, 60), "control_mask": white_box(80, 60), "width": size[0], "height": size[1]}
    for negative in (None, "bad"):
        call = {**SIZE, "prompt": PROMPTS[0], "negative_prompt": negative, **call}
        expected = theirs(**call, generator=seeded(7)).images
        torch.testing.assert_close(ours(mine, **call, seed=7), expected, rtol=0, atol=5e-5)


def test_a_mixed_batch_equals_single_runs(pair):
    sizes, images = [(64, 48), (32, 80)], [picture(64, 48), picture(20, 50, 1)]
    call = {"negative_prompt": "bad"}
    widths, heights = zip(*sizes)
    batch = ours(pair[0], prompt=PROMPTS, control_image=images, width=widths, height=heights, seed=[5, 6], **call)
    for k, (width, height) in enumerate(sizes):
        alone = ours(
            pair[0], prompt=PROMPTS[k], control_image=images[k], width=width, height=height, seed=5 + k, **call
        )
        torch.testing.assert_close(batch[k], alone[0], rtol=0, atol=2e-5)
    images[1], prompts = picture(20, 50, 9), [PROMPTS[0], PROMPTS[1].replace("cats", "dogs")]
    again = ours(pair[0], prompt=prompts, control_image=images, width=widths, height=heights, seed=[5, 8], **call)
    assert torch.equal(again[0], batch[0]) and not torch.equal(again[1], batch[1])


@pytest.mark.parametrize("extra", [0, 4], ids=["union", "inpainting"])
def test_bfloat16_errs_at_most_twice_as_much(edit_folder, extra):
    name = "QwenImageControlNetInpaintPipeline" if extra else "QwenImageControlNetPipeline"
    half_ours, half_theirs = nets(extra, dtype=torch.bfloat16)
    exact = nets(extra, dtype=torch.bfloat16)[1].double()
    cls = getattr(qwen_image_fast, name)
    mine = cls.from_pretrained(edit_folder, torch_dtype=torch.bfloat16, controlnet=half_ours)
    pipes = [mine, reference(name, edit_folder, torch.bfloat16, controlnet=half_theirs),
             reference(name, edit_folder, torch.float64, controlnet=exact)]  # fmt: skip
    for pipe in pipes:
        take_mode(pipe)
    for seed, (width, height) in enumerate(SIZES):
        tokens = (height // 16) * (width // 16)
        noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        call = {"control_image": picture(61, 37, seed), "width": width, "height": height}
        call |= {"control_mask": white_box(61, 37)} if extra else {}
        call = {**SIZE, "prompt": PROMPTS[0], "negative_prompt": "bad", **call, "latents": noise}
        assert_errs_at_most_twice_as_much(*(pipe(**call).images for pipe in pipes))


def test_save_load_and_start_from_a_transformer(edit_folder, tmp_path, union):
    union[0].save_pretrained(tmp_path / "net")
    again = QwenImageControlNetModel.from_pretrained(tmp_path / "net")
    diffusers.QwenImageControlNetModel.from_pretrained(tmp_path / "net")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), union[0].state_dict().values()))
    pipe = qwen_image_fast.QwenImagePipeline.from_pretrained(edit_folder)
    fresh = QwenImageControlNetModel.from_transformer(pipe.transformer, num_layers=2, extra_condition_channels=4)
    assert fresh.controlnet_x_embedder.weight.shape == (192, 68) and not fresh.controlnet_blocks[1].weight.any()
    own, given = fresh.transformer_blocks[1].attn.to_q.weight, pipe.transformer.transformer_blocks[1].attn.to_q.weight
    assert torch.equal(own, given)
    with pytest.raises(ValueError, match="attention_head_dim must be the transformer's, .* got 8; others need"):
        QwenImageControlNetModel.from_transformer(pipe.transformer, attention_head_dim=8)
    heads = {"num_attention_heads": 2, "load_weights_from_transformer": False}
    fresh = QwenImageControlNetModel.from_transformer(pipe.transformer, num_layers=1, **heads)
    assert fresh.inner_dim == 2 * pipe.transformer.config.attention_head_dim
    theirs, mine = (
        signature(net.from_transformer).parameters for net in (diffusers.QwenImageControlNetModel, type(fresh))
    )
    assert list(mine) == list(theirs)


def test_a_pipeline_is_saved_moved_and_loaded_with_its_net(edit_folder, tmp_path):
    mine = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=nets()[0])
    assert mine.to(torch.float64).controlnet.dtype == torch.float64
    mine = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=nets()[0])
    mine.save_pretrained(tmp_path / "saved")
    again = QwenImageControlNetPipeline.from_pretrained(tmp_path / "saved")
    call = {"prompt": "x", "control_image": picture(32, 32), "seed": 0, "num_inference_steps": 2}
    assert torch.equal(ours(again, **call), ours(mine, **call))
    mine.controlnet = [mine.controlnet, mine.controlnet]
    with pytest.raises(ValueError, match="controlnet must be a single one, got 2"):
        mine.save_pretrained(tmp_path / "two")


def test_errors(edit_folder, pair):
    with pytest.raises(
        TypeError, match="controlnet must be a QwenImageControlNetModel of this package, or several, got"
    ):
        QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=nets()[1])
    changes = {"num_attention_heads": 2, "in_channels": 16, "joint_attention_dim": 64, "axes_dims_rope": (4, 10, 34)}
    for name, value in changes.items():
        other = QwenImageControlNetModel(**{**config(), name: value})
        with pytest.raises(ValueError, match=f"must be of the transformer's family: {name} must be .*, got "):
            QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=other)
    with pytest.raises(ValueError, match="controlnet must be one or several, got none"):
        QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=[])
    with pytest.raises(ValueError, match="must have the transformer's dtype and device, torch.bfloat16 on cpu, got to"):
        half = QwenImageControlNetPipeline.from_pretrained(
            edit_folder, torch_dtype=torch.bfloat16, controlnet=nets()[0]
        )
        ours(half, prompt="x", control_image=picture(32, 32))
    with pytest.raises(ValueError, match="controlnet must fit the pipeline, got an inpainting ControlNet"):
        pipe = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=nets(extra=4)[0])
        ours(pipe, prompt="x", control_image=picture(32, 32))
    with pytest.raises(TypeError, match="control_image must be a file, a PIL image, an array or a tensor, got N"):
        ours(pair[0], prompt="x")
    pipe = QwenImageControlNetPipeline.from_pretrained(edit_folder, controlnet=[nets()[0], nets()[0]])
    with pytest.raises(ValueError, match="control_image must hold one for each of the 2 ControlNets, got 1"):
        ours(pipe, prompt="x", control_image=[picture(32, 32)])
    for name, value, text in (
        ("controlnet_conditioning_scale", [1.0, 2.0], "one for all or one for each control picture, 1, got 2"),
        ("controlnet_conditioning_scale", float("nan"), "a finite number, got nan"),
        ("control_guidance_end", "1", "a finite number, got '1'"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {text}"):
            ours(pair[0], prompt="x", control_image=picture(32, 32), **{name: value})
    pipe = QwenImageControlNetInpaintPipeline.from_pretrained(edit_folder, controlnet=nets(extra=4)[0])
    with pytest.raises(ValueError, match="control_mask must be given, got None"):
        ours(pipe, prompt="x", control_image=picture(32, 32))
    with pytest.raises(ValueError, match="control_mask must have the size of its image, 32x32, or its aspect ratio, g"):
        ours(pipe, prompt="x", control_image=picture(32, 32), control_mask=white_box(32, 20))
    with pytest.raises(ValueError, match="control_mask must be white where the picture may change, .*, got 0"):
        ours(pipe, prompt="x", control_image=picture(32, 32), control_mask=np.zeros((32, 32), bool))
    with pytest.raises(ValueError, match="control_mask must be white at a latent pixel, .* of the 64x64 picture"):
        ours(pipe, prompt="x", control_image=picture(64, 64), control_mask=speck(64, 64), height=64)


def test_a_control_mask_of_zeros_and_ones(edit_folder):
    pipe = QwenImageControlNetInpaintPipeline.from_pretrained(edit_folder, controlnet=nets(extra=4)[0])
    call = {"prompt": "x", "control_image": picture(64, 48), "seed": 0}
    white = white_box(64, 48)
    ones = (np.asarray(white) == 255).astype(np.uint8)
    assert torch.equal(ours(pipe, **call, control_mask=ones), ours(pipe, **call, control_mask=white))
