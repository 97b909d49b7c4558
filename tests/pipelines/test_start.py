"""Image to image and the inpaintings against diffusers' pipelines with the same folder and seed."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reference import AREA, assert_errs_at_most_twice_as_much, picture, reference, seeded, take_mode

import qwen_image_fast
from qwen_image_fast.pictures import to_mask
from qwen_image_fast.pipelines import conditions, masks
from qwen_image_fast.pipelines.images import area_size
from qwen_image_fast.pipelines.latents import pack_latents

NAMES = ["QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageEditInpaintPipeline"]
PROMPT = "turn the sky blue"
SIZES = [(64, 64), (96, 32), (32, 112), (75, 50)]


def white_box(width, height):
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2 + 3, width // 3 :] = 255
    return Image.fromarray(mask)


def speck(width, height):
    """White between the corners of latent pixels."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (17, 17, 24, 24))
    return mask


def call_of(name, size, seed=0):
    mask = {} if "Img2Img" in name else {"mask_image": white_box(*size)}
    return {"image": picture(*size, seed), "prompt": PROMPT, "num_inference_steps": 4, "output_type": "latent", **mask}


def ours(pipe, **call):
    small = {"condition_area": AREA} if hasattr(pipe, "processor") else {}
    return pipe(**{"preserve_size": False, "progress": False, **small, **call}).images


def load(name, folder, dtype=torch.float32):
    return getattr(qwen_image_fast, name).from_pretrained(folder, torch_dtype=dtype)


@pytest.fixture(scope="module", params=NAMES)
def pair(request, edit_folder, small):
    return request.param, load(request.param, edit_folder), reference(request.param, edit_folder)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_latents_equal_diffusers(pair, size, strength):
    name, mine, theirs = pair
    call = {**call_of(name, size), "strength": strength, "negative_prompt": "blurry"}
    call |= {"width": size[0], "height": size[1]}
    expected = theirs(**call, generator=seeded(7)).images
    got = ours(mine, **call, seed=7)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_one_generator_and_images_equal_diffusers(pair):
    name, mine, theirs = pair
    call = {**call_of(name, (64, 48)), "width": 64, "height": 48, "output_type": "np"}
    expected = theirs(**call, generator=torch.Generator().manual_seed(3)).images
    got = ours(mine, **call, generator=torch.Generator().manual_seed(3))
    assert np.abs(got[0] - expected[0]).max() < 1 / 255


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_errs_at_most_twice_as_much(edit_folder, small, name, monkeypatch):
    mine = load(name, edit_folder, torch.bfloat16)
    exact, half = reference(name, edit_folder, torch.float64), reference(name, edit_folder, torch.bfloat16)
    # The pictures' latents are drawn in each type's own way: take the mode, and one noise for all.
    noise = {}
    for pipe in (mine, exact, half):
        patch_noise(pipe, noise, monkeypatch)
    for seed, (width, height) in enumerate(SIZES):
        w, h = area_size(AREA, width, height) if "Edit" in name else (width, height)
        noise["seed"], noise["size"] = seed, (h // 16 * 2, w // 16 * 2)
        call = {**call_of(name, (width, height), seed), "width": width, "height": height, "num_inference_steps": 2}
        assert_errs_at_most_twice_as_much(ours(mine, **call), half(**call).images, exact(**call).images)


def patch_noise(pipe, noise, monkeypatch):
    """The VAE returns its mode, and the noise is that of noise["seed"] in bfloat16."""
    take_mode(pipe)

    def draw(shape_or_sizes, *args, dtype=torch.bfloat16, **kwargs):
        source = torch.Generator().manual_seed(noise["seed"])
        return torch.randn(1, 1, 16, *noise["size"], generator=source, dtype=torch.bfloat16).to(dtype)

    if hasattr(pipe, "_noise"):
        pipe._noise = lambda *args: [pack_latents(draw(None))[0]]
    else:
        monkeypatch.setattr(sys.modules[type(pipe).__module__], "randn_tensor", draw)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_equals_single_runs(edit_folder, name):
    pipe = load(name, edit_folder)
    calls = [call_of(name, size, k) for k, size in enumerate([(64, 48), (33, 70), (16, 16)])]
    for k, call in enumerate(calls):
        call["prompt"] = PROMPT * (k + 1)
    together = {key: [call[key] for call in calls] for key in calls[0] if key in ("image", "mask_image", "prompt")}
    rest = {"negative_prompt": "bad", "preserve_size": True}
    batch = ours(pipe, **{**calls[0], **together, **rest}, seed=[5, 6, 7])
    for k, call in enumerate(calls):
        alone = ours(pipe, **call, **rest, seed=5 + k)[0]
        torch.testing.assert_close(batch[k], alone, rtol=0, atol=2e-5)
    together["image"][2], together["prompt"][2] = picture(16, 16, 9), together["prompt"][2].replace("blue", "pink")
    again = ours(pipe, **{**calls[0], **together, **rest}, seed=[5, 6, 8])
    assert torch.equal(again[0], batch[0]) and torch.equal(again[1], batch[1]) and not torch.equal(again[2], batch[2])


def test_batches_of_pictures(edit_folder):
    """As arrays and tensors, as diffusers takes them."""
    pipe, call = load(NAMES[1], edit_folder), call_of(NAMES[1], (48, 32))
    images, mask = [picture(48, 32, seed) for seed in range(2)], call["mask_image"]
    call |= {"prompt": [PROMPT, "x"], "width": 48, "height": 32}
    expected = ours(pipe, **{**call, "image": images}, seed=[0, 1])
    arrays = np.stack([np.asarray(image) for image in images])
    tensors = torch.from_numpy(arrays).movedim(-1, 1) / 255
    for image, shown in ((arrays, np.asarray(mask)[None, :, :, None]), (tensors, mask)):
        assert torch.equal(ours(pipe, **{**call, "image": image, "mask_image": shown}, seed=[0, 1]), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_keeps_the_exact_size(edit_folder, name):
    call = {**call_of(name, (61, 37)), "output_type": "pil", "preserve_size": True}
    assert ours(load(name, edit_folder), **call, seed=0)[0].size == (61, 37)


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_is_not_masked_keeps_its_latents(edit_folder, name):
    """The last step ends at the picture's own latents outside the mask."""
    pipe = load(name, edit_folder)
    take_mode(pipe)
    call = {**call_of(name, (64, 64)), "preserve_size": True, "strength": 1.0}
    whole = conditions.encode_reference_latents(pipe.vae, [call["image"]]).latents[0]
    part = ours(pipe, **call, seed=0)[0]
    changed = (whole - part).abs().amax(-1).view(4, 4) > 0
    expected = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(changed, expected)


def test_a_mask_of_another_size_is_resized(edit_folder):
    call = {**call_of("QwenImageInpaintPipeline", (64, 48)), "preserve_size": True}
    pipe, large = load("QwenImageInpaintPipeline", edit_folder), white_box(256, 192)
    got = ours(pipe, **{**call, "mask_image": large}, seed=0)
    small = large.resize((64, 48), Image.Resampling.LANCZOS)
    assert torch.equal(got, ours(pipe, **{**call, "mask_image": small}, seed=0))


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_mask_on_a_clear_layer_is_that_on_black(edit_folder, name):
    call = {**call_of(name, (64, 48)), "preserve_size": True}
    clear = Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    clear.paste("white", mask=call["mask_image"])
    pipe = load(name, edit_folder)
    assert torch.equal(ours(pipe, **{**call, "mask_image": clear}, seed=0), ours(pipe, **call, seed=0))


def zeros_and_ones(size):
    """A mask of `white_box` as programs hold them."""
    white = np.asarray(white_box(*size)) == 255
    return {
        "bool": white, "uint8": white.astype(np.uint8), "int64": white.astype(np.int64), "float": white.astype(float),
        "bool tensor": torch.from_numpy(white), "int64 tensor": torch.from_numpy(white).long(),
        "channel": white.astype(np.uint8)[..., None], "PIL": Image.fromarray(white.astype(np.uint8)),
        "PIL, 1 bit": Image.fromarray(white), "PIL, 16 bits": Image.fromarray(white.astype(np.uint16)),
        "PIL, 32 bits": Image.fromarray(white.astype(np.int32)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", zeros_and_ones((8, 8)))
def test_zeros_and_ones_are_black_and_white(edit_folder, kind):
    mask = zeros_and_ones((64, 48))[kind]
    assert to_mask("x", mask).tobytes() == white_box(64, 48).convert("RGB").tobytes()
    if kind == "uint8":
        pipe, call = load(NAMES[1], edit_folder), {**call_of(NAMES[1], (64, 48)), "preserve_size": True}
        assert torch.equal(ours(pipe, **{**call, "mask_image": mask}, seed=0), ours(pipe, **call, seed=0))


def test_a_white_mask_changes_all(edit_folder):
    """At strength 1 nothing of the picture is left: so without one."""
    pipe, call = load(NAMES[1], edit_folder), call_of(NAMES[1], (64, 48))
    call |= {"strength": 1.0, "seed": 0, "preserve_size": True}
    white = ours(pipe, **{**call, "mask_image": np.ones((48, 64), np.uint8)})
    del call["mask_image"]
    assert torch.equal(white, ours(load(NAMES[0], edit_folder), **call))


@pytest.mark.parametrize("size", [(200, 120), (120, 200), (64, 64)], ids=str)
@pytest.mark.parametrize("box", [(0.1, 0.2, 0.4, 0.25), (0, 0, 0.2, 0.9), (0.8, 0.3, 0.95, 0.4)], ids=str)
def test_crop_geometry_equals_diffusers(size, box):
    from diffusers.image_processor import VaeImageProcessor

    theirs = VaeImageProcessor(vae_scale_factor=16)
    mask = Image.new("L", size, 0)
    mask.paste(255, tuple(int(share * side) for share, side in zip(box, size * 2)))
    for width, height in ((64, 64), (96, 32), (32, 80)):
        expected = theirs.get_crop_region(mask, width, height, pad=8)
        assert masks.crop_region(mask, width, height, 8) == expected
        image = picture(*size)
        filled = theirs._resize_and_fill(image.crop(expected), width, height)
        assert masks.resize_and_fill(image.crop(expected), width, height).tobytes() == filled.tobytes()
        result = picture(width, height, 5)
        pasted = theirs.apply_overlay(mask, image, result, expected)
        assert masks.paste_back(result, image, mask, expected).tobytes() == pasted.tobytes()


def test_padding_mask_crop_equals_diffusers(edit_folder):
    name = "QwenImageInpaintPipeline"
    call = {**call_of(name, (120, 90)), "width": 64, "height": 48, "padding_mask_crop": 5, "output_type": "pil"}
    expected = reference(name, edit_folder)(**call, generator=seeded(3)).images[0]
    for preserve_size in (True, False):
        got = ours(load(name, edit_folder), **call, preserve_size=preserve_size, seed=3)[0]
        assert got.size == (120, 90) and np.abs(np.int16(got) - np.int16(expected)).max() <= 1
    outside = np.asarray(white_box(120, 90)) == 0
    assert np.array_equal(np.asarray(got)[outside], np.asarray(call["image"])[outside])


def test_edit_inpaint_with_embeddings_of_one_prompt(edit_folder, small):
    name = "QwenImageEditInpaintPipeline"
    torch.manual_seed(0)
    call = {**call_of(name, (64, 48)), "prompt": None, "prompt_embeds": torch.randn(1, 6, 128), "negative_prompt": "x"}
    expected = reference(name, edit_folder)(**call, generator=seeded(7)).images
    torch.testing.assert_close(ours(load(name, edit_folder), **call, seed=7), expected, rtol=0, atol=5e-5)


ERRORS = {
    "image must be given, got None": {"image": None},
    "image must have pixels, got 0x3": {"image": Image.new("RGB", (0, 3))},
    "mask_image must be given, got None": {"mask_image": None},
    "mask_image must have the size of its image, 64x64, or its aspect ratio, got 64x20": {
        "mask_image": white_box(64, 20)
    },
    r"strength must be in \[0, 1\], got 1.5": {"strength": 1.5},
    r"strength must be in \[0, 1\], got '1'": {"strength": "1"},
    "padding_mask_crop must be an integer of at least 0, got -3": {"padding_mask_crop": -3},
    "image must be one for all or one for each prompt, 1, got 2": {"image": torch.rand(2, 3, 64, 64)},
    "strength must leave at least one of the 4 steps, got 0": {"strength": 0},
    "output_type must be 'pil' with padding_mask_crop": {"padding_mask_crop": 3},
    "mask_image must be white where the picture may change, at least 128 of 255, got 0": {
        "padding_mask_crop": 3, "output_type": "pil", "mask_image": Image.new("L", (64, 64), 0),
    },
    "mask_image must be white where the picture may change, at least 128 of 255, got 127": {
        "mask_image": Image.new("L", (64, 64), 127),
    },
    "mask_image must be white at a latent pixel, the corner of 8 x 8 pixels, of the 64x64 picture": {
        "mask_image": speck(64, 64), "width": 64, "height": 64,
    },
    r"mask_image\[1\] must be white at a latent pixel": {
        "image": [picture(64, 64)] * 2, "mask_image": [white_box(64, 64), speck(64, 64)], "prompt": ["x", "y"],
        "width": 64, "height": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize(("text", "change"), ERRORS.items(), ids=ERRORS.keys())
def test_errors(edit_folder, text, change):
    name = "QwenImageInpaintPipeline"
    with pytest.raises(ValueError, match=text):
        ours(load(name, edit_folder), **{**call_of(name, (64, 64)), **change})
