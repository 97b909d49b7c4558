"""A result with NaN or infinity is an error that names the model it comes from, never a picture."""

import pytest
import torch
from reference import picture
from test_controlnet import nets
from test_layered import models, rgba
from test_start import white_box

import qwen_image_fast

SIZE = (32, 32)
PICTURES = {
    "QwenImagePipeline": {"width": 32, "height": 32},
    "QwenImageImg2ImgPipeline": {"image": picture(*SIZE)},
    "QwenImageInpaintPipeline": {"image": picture(*SIZE), "mask_image": white_box(*SIZE)},
    "QwenImageEditPipeline": {"image": picture(*SIZE)},
    "QwenImageEditPlusPipeline": {"image": [picture(*SIZE)]},
    "QwenImageEditInpaintPipeline": {"image": picture(*SIZE), "mask_image": white_box(*SIZE)},
    "QwenImageLayeredPipeline": {"image": rgba(*SIZE), "layers": 1, "preserve_size": True},
    "QwenImageControlNetPipeline": {"control_image": picture(*SIZE), "width": 32, "height": 32},
}
WITH_PICTURES = [name for name in PICTURES if name != "QwenImagePipeline"]


def load(name, folder, **options):
    parts = {}
    if "Layered" in name:
        parts = {key: ours for key, (ours, _) in models(torch.float16).items()}
    elif "ControlNet" in name:
        parts = {"controlnet": nets(dtype=torch.float16)[0]}
    return getattr(qwen_image_fast, name).from_pretrained(folder, torch_dtype=torch.float16, **parts, **options)


def made_by(pipe, **call):
    call = {"prompt": "x", "num_inference_steps": 2, "true_cfg_scale": 1.0, "seed": 0, "progress": False, **call}
    return pipe(**PICTURES[type(pipe).__name__], **call).images


def scale(module, factor):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(factor)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("name", ["QwenImagePipeline", "QwenImageEditPlusPipeline", "QwenImageLayeredPipeline"])
def test_a_decoder_that_overflows(edit_folder, name, output_type):
    pipe = load(name, edit_folder)
    made_by(pipe, output_type=output_type)
    scale(pipe.vae.decoder, 1e4)
    assert all(torch.isfinite(p).all() for p in pipe.vae.parameters())
    text = "AutoencoderKLQwenImage.decode: the pixels are not finite in float16, though all weights of the VAE are; try"
    with pytest.raises(ValueError, match=text):
        made_by(pipe, output_type=output_type)
    scale(pipe.vae.decoder, 1e6)
    with pytest.raises(ValueError, match="the pixels are not finite: the VAE has NaN or infinity in decoder.conv_in.w"):
        made_by(pipe, output_type=output_type)


@pytest.mark.parametrize("tiling", [False, True])
def test_infinite_pixels_are_not_clamped_to_white(edit_folder, tiling):
    vae = load("QwenImagePipeline", edit_folder).vae
    if tiling:
        vae.enable_tiling(32, 32, 16, 16)
    torch.nn.init.constant_(vae.decoder.conv_out.weight, 6e4)
    text = "AutoencoderKLQwenImage.decode: the pixels are not finite in float16"
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        vae.decode(torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).half())


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_an_encoder_that_overflows(edit_folder, name):
    pipe = load(name, edit_folder)
    scale(pipe.vae.encoder, 1e4)
    with pytest.raises(ValueError, match="AutoencoderKLQwenImage.encode: the latents are not finite in float16"):
        made_by(pipe, output_type="latent")


def test_gradients_flow_through_what_is_not_finite(edit_folder):
    """A training run that diverges is told by its trainer, with the batch."""
    vae = load("QwenImagePipeline", edit_folder).vae.float().requires_grad_()
    scale(vae.quant_conv, float("inf"))
    assert vae.encode(torch.rand(1, 3, 1, 16, 16) - 0.5).latent_dist.mean.isnan().any()


@pytest.mark.parametrize("name", PICTURES)
def test_a_text_encoder_that_overflows(edit_folder, name):
    pipe = load(name, edit_folder)
    text_model = getattr(pipe.text_encoder, "model", pipe.text_encoder)
    scale(getattr(text_model, "language_model", text_model).norm, 6e4)
    with pytest.raises(
        ValueError, match="the states are not finite in float16, though all weights of text_encoder are"
    ):
        made_by(pipe, output_type="latent")
    if name == "QwenImagePipeline":
        with pytest.raises(ValueError, match="the states are not finite in float16"):
            pipe.encode_prompt("x")


def test_a_controlnet_that_overflows_or_is_damaged(edit_folder):
    pipe = load("QwenImageControlNetPipeline", edit_folder)
    scale(pipe.controlnet.controlnet_blocks, 1e5)
    with pytest.raises(ValueError, match="the residuals of a ControlNet are not finite in float16, though all weights"):
        made_by(pipe, output_type="latent")
    damaged = nets(dtype=torch.float16)[0]
    damaged.img_in.bias.data[0] = float("nan")
    pipe.controlnet = [nets(dtype=torch.float16)[0], damaged]
    with pytest.raises(ValueError, match=r"not finite: controlnet\[1\] has NaN or infinity in img_in.bias; load it"):
        pipe("x", control_image=[picture(*SIZE)] * 2, width=32, height=32, num_inference_steps=2, progress=False)


def test_released_weights_are_not_looked_at(edit_folder):
    pipe = load("QwenImagePipeline", edit_folder, free_modulation_weights=True)
    pipe.transformer.transformer_blocks[2].attn.to_k.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="transformer has NaN or infinity in transformer_blocks.2.attn.to_k.weight"):
        made_by(pipe)
