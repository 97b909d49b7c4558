"""A picture that its EXIF entry turns is upright wherever training decodes it."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_pictures import encoded
from PIL import Image
from trainer_helpers import small_recipe

from qwen_image_fast.training.batches.batches import FlowBatches
from qwen_image_fast.training.data import annotate
from qwen_image_fast.training.data.contact_sheet import RejectedSheet
from qwen_image_fast.training.data.examples import thumbnail
from qwen_image_fast.training.data.filters.picture import Picture
from qwen_image_fast.training.data.pipeline import run_filters
from qwen_image_fast.training.data.recipe import AnnotateRecipe, FilterRecipe, SourceRecipe
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.synthesis.photos import open_photo
from qwen_image_fast.training.tasks.vae import VaeBatches

HEIGHT, WIDTH = 96, 64
# How the upright picture is stored so that an orientation turns it back.
STORED = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


def turned(orientation, kind="JPEG"):
    """A tall picture, red above blue with a green left edge, stored as a camera held otherwise stores it."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2, :, 0] = pixels[HEIGHT // 2 :, :, 2] = 255
    pixels[:, : WIDTH // 4] = (0, 255, 0)
    image = Image.fromarray(pixels)
    if STORED[orientation] is not None:
        image = image.transpose(Image.Transpose(STORED[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def is_upright(image):
    image = np.asarray(image, int)
    height, width = image.shape[:2]
    assert height > width
    for y, x, wanted in ((0.2, 0.6, (255, 0, 0)), (0.8, 0.6, (0, 0, 255)), (0.2, 0.1, (0, 255, 0))):
        assert np.abs(image[int(y * height), int(x * width)] - wanted).max() < 30, (y, x)


@pytest.fixture
def folder_of(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jpg").write_bytes(turned(6))
    (root / "a.txt").write_text("red above blue, green at the left")
    return root


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_orientation(orientation, kind):
    picture = Picture(Record(turned(orientation, kind)))
    is_upright(picture.rgb)
    assert picture.size == (HEIGHT, WIDTH) and picture.orientation == orientation


def test_a_camera_s_picture_with_a_preview():
    """An MPO, a JPEG with further pictures behind it, is its first picture."""
    with Image.open(io.BytesIO(turned(6))) as first:
        file = io.BytesIO()
        first.save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], exif=first.getexif())
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert image.n_frames == 2
    is_upright(Picture(Record(file.getvalue())).rgb)


@pytest.mark.parametrize("kind", ["folder", "table", "pairs", "shards"])
def test_sources_and_their_batches(tmp_path, folder_of, kind):
    source, tasks, origin = folder_of, {"t2i": 1.0}, folder_of / "a.jpg"
    if kind == "table":
        source = tmp_path / "table.jsonl"
        source.write_text(json.dumps({"image": "in/a.jpg", "caption": "a picture"}))
    elif kind == "pairs":
        source, tasks = tmp_path / "pairs", {"ti2i": 1.0}
        source.mkdir()
        for name in ("a.before.jpg", "a.after.jpg"):
            (source / name).write_bytes(turned(6))
        (source / "a.txt").write_text("keep it")
    elif kind == "shards":
        source = tmp_path / "shards"
        write_shards([Record(origin.read_bytes(), {"raw": "a picture"}, origin="a.jpg")], source)
    made = make_source(DataRecipe(source=str(source), tasks=tasks))
    sample = made.edit(0, 0) if kind == "pairs" else made.sample(0, 0)
    for image in (sample.image, *sample.references):
        is_upright(image)
    # The bucket is that of the upright picture.
    buckets = [[HEIGHT, WIDTH], [WIDTH, HEIGHT]]
    recipe = small_recipe("x", data__buckets=buckets, data__tasks=tasks)
    raw = FlowBatches(recipe, made, 64).batch(0, 0)[0]
    for image, shape in zip(raw.images, raw.shapes, strict=True):
        is_upright(image)
        assert shape == (1, HEIGHT // 16, WIDTH // 16)


def test_the_vae_s_pictures(folder_of):
    recipe = small_recipe(
        "", kind="vae", model=None, data__buckets=[[HEIGHT, WIDTH], [WIDTH, HEIGHT]], data__options={},
        data__source=str(folder_of),
    )  # fmt: skip
    for image in VaeBatches(recipe, make_source(recipe.data)).batch(0, 0).images:
        is_upright(image)


def test_filters_their_audit_examples_and_report(tmp_path, folder_of):
    recipe = FilterRecipe(sources=[SourceRecipe(str(folder_of))], stages=[1, 2])
    recipe.curation.min_side, recipe.curation.min_bytes = 16, 1
    recipe.without = ["nsfw", "rotation", "saturation", "clarity", "texture", "rgb_entropy"]
    assert run_filters(recipe, tmp_path / "out").kept == 1
    (row,) = pq.read_table(tmp_path / "out" / "audit.parquet").to_pylist()
    assert (row["height"], row["width"]) == (HEIGHT, WIDTH)
    record = Record(turned(6), origin="a.jpg")
    with Image.open(io.BytesIO(thumbnail(record, 10**6))) as small:
        is_upright(small)
    sheet = RejectedSheet(4, 1, 10**6)
    sheet.add(record, {"filter": "luma", "reason": "it is dark", "origin": "a.jpg"})
    sheet.write(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        is_upright(image.crop((12, 12, 12 + WIDTH, 12 + HEIGHT)))
    # The shards have the bytes as they came, and are upright when they are read.
    is_upright(make_source(DataRecipe(source=str(tmp_path / "out" / "shards"))).sample(0, 0).image)


def test_what_a_captioner_sees(tmp_path, folder_of):
    seen = []

    def chat(system, prompt, pictures=()):
        seen.extend(pictures)
        return "no annotation"

    recipe = AnnotateRecipe(sources=[SourceRecipe(str(folder_of))], model="x", attempts=1, parallel=1)
    annotate.annotate(recipe, tmp_path / "out", chat=chat)
    assert len(seen) == 1
    is_upright(seen[0])


def test_photographs_behind_drawn_text(folder_of):
    is_upright(open_photo(str(folder_of / "a.jpg")))
