"""What pictures may be, and what becomes of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image_fast import QwenImageEditPlusPipeline
from qwen_image_fast.models.rope import sample_rope
from qwen_image_fast.pictures import to_mask, to_rgb, to_rgba
from qwen_image_fast.pipelines.images import area_size


def saved(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, format=fmt, **options)
    file.seek(0)
    return Image.open(file)


RED = Image.new("RGB", (6, 4), (200, 10, 20))


def exif_rotated():
    image = Image.new("RGB", (6, 4), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    return saved(image, "PNG", exif=exif)


def test_conversions():
    assert to_rgb("x", RED).tobytes() == RED.tobytes()
    assert to_rgb("x", RED.convert("P", palette=Image.Palette.ADAPTIVE)).getpixel((1, 1)) == (200, 10, 20)
    assert to_rgb("x", Image.new("L", (3, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb("x", Image.new("1", (3, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb("x", Image.new("CMYK", (3, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb("x", Image.new("RGBA", (3, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb("x", Image.new("LA", (3, 2), (0, 255))).getpixel((0, 0)) == (0, 0, 0)
    sixteen = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert [to_rgb("x", saved(sixteen, "PNG")).getpixel((k, 0))[0] for k in range(3)] == [0, 128, 255]
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [to_rgb("x", unit).getpixel((k, 0))[0] for k in range(3)] == [0, 128, 255]
    for mode in "IF":  # as PIL converts 8-bit grey
        assert to_rgb("x", Image.new("L", (3, 2), 77).convert(mode)).getpixel((0, 0)) == (77, 77, 77)
    upright = to_rgb("x", exif_rotated())
    assert upright.size == (4, 6) and upright.getpixel((3, 0)) == (0, 0, 255)
    frames = saved(Image.new("RGB", (4, 4), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert frames.is_animated and to_rgb("x", frames).getpixel((0, 0)) == (255, 0, 0)
    frames.seek(1)
    assert to_rgb("x", frames).getpixel((0, 0)) == (0, 0, 0) == to_rgba("x", frames).getpixel((0, 0))[:3]
    alpha = to_rgba("x", Image.new("RGBA", (3, 2), (255, 0, 0, 9)))
    assert alpha.getpixel((0, 0)) == (255, 0, 0, 9) and to_rgba("x", RED).getpixel((0, 0)) == (200, 10, 20, 255)


GREY = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
WIDE_GREY = Image.fromarray(np.array([[7 * 257, 9 * 257]], dtype=np.uint16))
CLEAR = {
    "palette": saved(GREY.convert("P"), "PNG", transparency=9),
    "palette with alpha": saved(GREY.convert("P"), "PNG", transparency=bytes([255] * 9 + [0])),
    "grey": saved(GREY, "PNG", transparency=9),
    "16-bit grey": saved(WIDE_GREY, "PNG", transparency=9 * 257),
    "16-bit grey, big-endian": saved(Image.frombytes("I;16B", (2, 1), bytes([7, 7, 9, 9])), "TIFF"),
    "RGB": saved(GREY.convert("RGB"), "PNG", transparency=(9, 9, 9)),
    "grey with alpha": Image.merge("LA", (GREY, GREY.point(lambda v: 255 * (v < 9)))),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_one_clear_pixel(kind):
    """Beside an opaque one of grey 7."""
    picture = CLEAR[kind]
    clear = kind != "16-bit grey, big-endian"
    assert [to_rgb("x", picture).getpixel((k, 0))[0] for k in range(2)] == [7, 255 if clear else 9]
    assert to_rgba("x", picture).getpixel((0, 0)) == (7, 7, 7, 255)
    assert to_rgba("x", picture).getpixel((1, 0)) == (9, 9, 9, 0 if clear else 255)


def test_a_mask_painted_on_a_clear_layer():
    """What is clear stays, whatever colour it has."""
    mask = Image.new("RGBA", (3, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    mask.putpixel((2, 0), (0, 0, 0, 0))
    assert [to_mask("x", mask).getpixel((k, 0))[0] for k in range(3)] == [0, 255, 0]
    assert to_mask("x", Image.new("1", (3, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_formats():
    """What a file may be; MPO is what many phones write, APNG and WebP may be animated."""
    for fmt in ("PNG", "WEBP", "GIF", "MPO", "TIFF"):
        frames = [RED.copy(), Image.new("RGB", (6, 4), "blue")]  # saving leaves settings behind in a picture
        options = {"lossless": True} if fmt == "WEBP" else {}
        picture = saved(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
        assert picture.n_frames == 2
        assert np.abs(np.int16(to_rgb("x", picture)) - np.int16(RED)).max() <= 3, fmt
        assert picture.tell() == 0
    assert to_rgb("x", saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))[1:] == (0, 0)


def test_arrays_and_tensors():
    pixels = np.asarray(RED)
    for image in (
        pixels, pixels / 255, (pixels / 255).astype(np.float32), torch.from_numpy(pixels.copy()).movedim(-1, 0),
        torch.from_numpy(pixels / 255).movedim(-1, 0).bfloat16().float(),
    ):  # fmt: skip
        assert np.abs(np.int16(to_rgb("x", image)) - np.int16(pixels)).max() <= 1
    assert to_rgb("x", np.ones((2, 3, 1), dtype=np.uint8)).size == (3, 2)
    assert to_rgb("x", torch.ones(2, 3)).size == to_rgb("x", torch.ones(1, 2, 3)).size == (3, 2)
    gradient = torch.rand(3, 2, 4, requires_grad=True)
    assert to_rgb("x", gradient).tobytes() == to_rgb("x", gradient.detach().numpy().transpose(1, 2, 0)).tobytes()
    assert to_rgb("x", pixels[::-1, ::-1]).tobytes() == RED.rotate(180).tobytes()
    assert to_rgb("x", np.array([[True, False]])).getpixel((0, 0)) == (255, 255, 255)


def cut_short():
    file = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(file, format="JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


ERRORS = [
    (cut_short(), ValueError, "x could not be read as a picture: image file is truncated"),
    (None, TypeError, "x must be a PIL image, an array or a tensor, got NoneType"),
    ("a.png", TypeError, "got str"),
    (Image.new("RGB", (0, 4)), ValueError, "x must have pixels, got 0x4"),
    (np.zeros((0, 4, 3), np.uint8), ValueError, "x must have pixels, got 4x0"),
    (np.zeros((4, 4, 7), np.uint8), ValueError, r"or \[height, width, 1, 3 or 4\], got the shape \(4, 4, 7\)"),
    (torch.zeros(1, 3, 4, 4), ValueError, r"x must be a tensor \[channels, height, width\]"),
    (np.full((4, 4, 3), 2.0), ValueError, r"x must hold pixels in \[0, 1\]"),
    (np.full((4, 4, 3), np.nan), ValueError, r"x must hold pixels in \[0, 1\]"),
    (np.zeros((4, 4, 3), np.int64), ValueError, "x must be uint8, or floating point"),
]


@pytest.mark.parametrize(("image", "kind", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_errors(image, kind, text):
    with pytest.raises(kind, match=text):
        to_rgb("x", image)


def test_sizes_are_those_of_diffusers():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    for width, height in ((1024, 1024), (1920, 1080), (777, 1333), (61, 37), (400, 300)):
        for area in (1024 * 1024, 384 * 384, 640 * 640):
            assert area_size(area, width, height) == calculate_dimensions(area, width / height)


CALLS = {
    "image must hold pictures for all prompts, or one list for each of the 1 prompts, got 2 entries": {
        "image": [[RED], RED]
    },
    "image must hold fewer than 4096 pictures for a prompt, got 4096": {"image": [RED] * 4096},
    "height must be a positive integer, got 0": {"height": 0},
    "height must be one for all or one for each prompt, 1, got 2": {"height": [16, 32]},
    r"prompt must not contain <\|image_pad\|>": {"prompt": "a <|image_pad|>"},
    r"image\[0\] must be a PIL image, an array or a tensor, got str": {"image": ["a.png"]},
    "height and width must be at least 16, got 9x40": {"preserve_size": False, "height": 40, "width": 9},
    "true_cfg_scale must be a finite number, got nan": {"true_cfg_scale": float("nan")},
    "true_cfg_scale must be a finite number, got '4'": {"true_cfg_scale": "4"},
    "condition_area must be at least 1, got 0": {"condition_area": 0},
    r"must return latents of the shapes \[\(1, 64\)\], got \[\(0, 64\)\]": {
        "callback_on_step_end": lambda pipe, step, t, values: {"latents": values["latents"][:, :0]}
    },
    "max_sequence_length must be in 1..1024, got 2000": {"max_sequence_length": 2000},
    "image must have an aspect ratio of at most 200, got 1x300 pixels": {"image": Image.new("RGB", (1, 300))},
}


@pytest.mark.parametrize(("text", "change"), CALLS.items(), ids=CALLS.keys())
def test_bad_calls(edit_folder, text, change):
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    with pytest.raises((ValueError, TypeError), match=text):
        pipe(**{"image": RED, "prompt": "x", "num_inference_steps": 2, "progress": False, **change})


def test_more_references_than_positions():
    with pytest.raises(ValueError, match="must stay within the 4096 positions of the RoPE tables, got position 4099"):
        sample_rope([(1, 2, 2)] * 4100, range(3), (8, 12, 12))
    with pytest.raises(ValueError, match="got position 4100"):
        sample_rope([(1, 2, 2)], range(4100), (8, 12, 12))
