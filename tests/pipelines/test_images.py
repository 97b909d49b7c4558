"""What pictures may be, and what becomes of them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_image_fast import QwenImageEditPlusPipeline
from qwen_image_fast.models.rope import sample_rope
from qwen_image_fast.pictures import decode, to_mask, to_rgb, to_rgba
from qwen_image_fast.pipelines.images import area_size


def saved(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, format=fmt, **options)
    file.seek(0)
    return Image.open(file)


RED = Image.new("RGB", (6, 4), (200, 10, 20))


def file_of(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, format=fmt, **options)
    return file.getvalue()


# What a camera held in one of eight ways stores, by the EXIF entry that tells how to turn it upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
UPRIGHT = Image.new("RGB", (24, 16), "red")
UPRIGHT.paste("blue", (0, 0, 8, 8))
UPRIGHT.paste("lime", (16, 0, 24, 8))


def turned(orientation, fmt="PNG", **options):
    """`UPRIGHT` as a file of such a camera."""
    method = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(UPRIGHT if method is None else UPRIGHT.transpose(method), fmt, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_upright_however_they_are_given(tmp_path, orientation, fmt):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(fmt, {})
    data = turned(orientation, fmt, **options)
    (tmp_path / "a").write_bytes(data)
    for given in (data, tmp_path / "a", str(tmp_path / "a"), Image.open(io.BytesIO(data)), decode("x", data)):
        for convert in (to_rgb, to_rgba, to_mask):
            found = convert("x", given).convert("RGB")
            assert found.size == UPRIGHT.size
            assert np.abs(np.int16(found) - np.int16(UPRIGHT)).max() <= (9 if fmt == "JPEG" else 0)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_used_and_said(fmt, caplog, monkeypatch):
    """Once; not of a phone's MPO, which is a photograph with its preview."""
    frames, options = [RED.copy(), Image.new("RGB", (6, 4), "blue")], {"lossless": True} if fmt == "WEBP" else {}
    data = file_of(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    for given in (data, data, Image.open(io.BytesIO(data))):
        assert np.abs(np.int16(to_rgb(f"the {fmt}", given)) - np.int16(RED)).max() <= 3
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if fmt == "MPO" else [f"the {fmt} has 2 frames or pages: number 1 is used"])
    if fmt != "MPO":
        with pytest.raises(ValueError, match="x could not be read as a picture: it has 2 frames or pages"):
            decode("x", data, frames=False)
    assert decode("x", file_of(RED, "PNG"), frames=False).size == RED.size


def test_what_was_drawn_on_a_frame_stays():
    """To count the frames of a GIF that is loaded would load it again."""
    data = file_of(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])
    picture = Image.open(io.BytesIO(data))
    picture.load()
    picture.paste(picture.getpixel((0, 0)) ^ 1, (0, 0, 6, 4))
    drawn = picture.convert("RGB").getpixel((1, 1))
    assert to_rgb("x", picture).getpixel((1, 1)) == drawn


def deep(mode):
    """A ramp of 16-bit grey, in each mode that PIL has for it."""
    return Image.fromarray(np.array([[0, 257 * 128, 65535]], np.uint16)).convert("I").convert(mode)


# Files of colour modes: bytes, and what their pixels are over white.
MODES = {
    "grey of 16 bits": (file_of(deep("I;16"), "PNG"), [0, 128, 255]),
    "grey of 16 bits, TIFF": (file_of(deep("I;16"), "TIFF"), [0, 128, 255]),
    "grey of 32 bits, TIFF": (file_of(deep("I"), "TIFF"), [0, 128, 255]),
    "1 bit": (file_of(Image.fromarray(np.array([[False, True]])), "PNG"), [0, 255]),
    "1 bit, TIFF": (file_of(Image.fromarray(np.array([[False, True]])), "TIFF"), [0, 255]),
    "grey and alpha": (file_of(Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8)), "PNG"), [9, 255]),
    "CMYK": (file_of(Image.new("CMYK", (2, 1), (0, 0, 0, 255)), "TIFF"), [0, 0]),
    "CMYK, JPEG": (file_of(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"), [0] * 64),
    "clear palette, PNG": (
        file_of(Image.fromarray(np.array([[3, 4]], np.uint8)).convert("P"), "PNG", transparency=4), [3, 255],
    ),
    "clear palette, GIF": (
        file_of(Image.fromarray(np.array([[3, 4]], np.uint8)).convert("P"), "GIF", transparency=4), [3, 255],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODES)
def test_colour_modes(kind, tmp_path):
    data, expected = MODES[kind]
    (tmp_path / "a").write_bytes(data)
    for given in (data, tmp_path / "a", Image.open(io.BytesIO(data)), decode("x", data)):
        found = np.asarray(to_rgb("x", given))
        assert found.shape[2] == 3 and np.abs(np.int16(found[..., 0]).flatten() - expected).max() <= 2


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
    (None, TypeError, "x must be a file, a PIL image, an array or a tensor, got NoneType"),
    ("none.png", FileNotFoundError, "none.png"),
    ("/", ValueError, "x could not be read as a picture: it is a folder"),
    ("https://host/a.png", ValueError, "x must be a file, an address is not fetched, got https://host/a.png"),
    (b"", ValueError, "x could not be read as a picture: it is empty"),
    (b"GIF89a", ValueError, "x could not be read as a picture: "),
    (b"no picture", ValueError, "x could not be read as a picture: its type is not known"),
    (Image.new("La", (2, 2)), ValueError, "x could not be read as a picture: .*conversion"),
    (Image.new("RGB", (0, 4)), ValueError, "x must have pixels, got 0x4"),
    (np.zeros((0, 4, 3), np.uint8), ValueError, "x must have pixels, got 4x0"),
    (np.zeros((4, 4, 7), np.uint8), ValueError, r"or \[height, width, 1, 3 or 4\], got the shape \(4, 4, 7\)"),
    (torch.zeros(2, 3, 4, 4), ValueError, r"x must be a tensor \[channels, height, width\]"),
    (torch.zeros(8, 5, 3), ValueError, r"height, width\], got \(8, 5, 3\): turn it with .permute\(2, 0, 1\), or"),
    (torch.full((3, 4, 4), -1.5), ValueError, r"x must hold pixels in \[0, 1\], or in \[-1, 1\]"),
    (np.full((4, 4, 3), 2.0), ValueError, r"x must hold pixels in \[0, 1\]"),
    (np.full((4, 4, 3), np.nan), ValueError, r"x must hold pixels in \[0, 1\]"),
    (np.zeros((4, 4, 3), np.int64), ValueError, "x must be uint8, or floating point"),
]


@pytest.mark.parametrize(("image", "kind", "text"), ERRORS, ids=[text for *_, text in ERRORS])
def test_errors(image, kind, text):
    with pytest.raises(kind, match=text):
        to_rgb("x", image)


def test_a_picture_too_large_to_decode():
    with pytest.raises(ValueError, match="x could not be read as a picture: it has 24 x 16 pixels, more than 300"):
        decode("x", turned(1), largest=300)
    assert decode("x", turned(6), largest=384).size == (24, 16)


def test_a_pipeline_takes_files(edit_folder, tmp_path):
    pipe = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    call = {"prompt": "x", "seed": 0, "num_inference_steps": 1, "output_type": "latent", "progress": False}
    expected = pipe(UPRIGHT, **call).images
    (tmp_path / "a.png").write_bytes(turned(6))
    for given in (tmp_path / "a.png", [str(tmp_path / "a.png")], turned(8)):
        assert torch.equal(pipe(given, **call).images, expected)


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
    r"image\[0\] must be a file, a PIL image, an array or a tensor, got int": {"image": [3]},
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
