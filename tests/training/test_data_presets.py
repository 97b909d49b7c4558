"""Presets keep what their purpose needs; a dry run says what would go and writes nothing."""

import io

import numpy as np
import pytest
from data_pictures import encoded, photos
from PIL import Image, ImageDraw, ImageFilter
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.data.presets import PRESETS
from qwen_image_fast.training.data.recipe import FilterRecipe, read_filter_recipe
from qwen_image_fast.training.recipe.fields import RecipeError


def set_of_a_person(folder):
    """Twenty pictures of 512 px that somebody might train a LoRA on: photographs, soft, dark, flat and drawn ones."""
    folder.mkdir()
    names = sorted(photos())
    for number in range(20):
        picture = Image.fromarray(photos()[names[number % 9]]).rotate(number // 9 * 5).resize((512, 512))
        if number % 7 == 3:
            picture = picture.filter(ImageFilter.GaussianBlur(1.5))
        if number % 7 == 4:
            picture = picture.point(lambda value: value // 4)
        if number % 7 == 5:  # a flat drawing
            picture = Image.new("RGB", (512, 512), "#f4d35e")
            ImageDraw.Draw(picture).ellipse((100, 60 + number * 8, 400, 300 + number * 8), fill="#ee4266")
            ImageDraw.Draw(picture).rectangle((30, 400 - number * 9, 200, 480), fill="#0ead69")
        turned = Image.Exif()
        turned[0x0112] = 6 if number == 2 else 1
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85, exif=turned)
        (folder / f"{number:02}.jpg").write_bytes(file.getvalue())
    return folder


def filtered(*arguments):
    result = CliRunner().invoke(app, ["data", "filter", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


def test_the_twenty_pictures_of_a_lora_stay_and_a_dry_run_writes_nothing(tmp_path):
    folder = set_of_a_person(tmp_path / "in")
    code, said = filtered(folder, "--preset", "lora", "--dry-run", "--out", tmp_path / "out")
    assert code == 0 and "20 of 20 kept" in said and "nothing is written" in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    (folder / "99-again.jpg").write_bytes((folder / "00.jpg").read_bytes())
    (folder / "98-small.png").write_bytes(encoded(np.zeros((64, 64, 3), np.uint8)))
    code, said = filtered(folder, "--preset", "lora", "--dry-run")
    assert "20 of 22 kept" in said and "98-small.png: the picture is too small: resolution is 64" in said
    assert "1 rejected by exact_duplicate 99-again.jpg: the file is the same as 00.jpg" in said
    code, said = filtered(folder, "quality.min_luma=0.9", "--preset", "lora", "--out", tmp_path / "out")
    assert code == 0 and "rejected by luma" in said and (tmp_path / "out" / "audit.parquet").exists()


def test_a_result_inside_of_the_data_is_refused(tmp_path):
    """Its rejected.png was a record of the next run."""
    folder = set_of_a_person(tmp_path / "in")
    for out in (folder, folder / "out", tmp_path / "in" / ".." / "in" / "out"):
        code, said = filtered(folder, "--preset", "lora", "--out", out)
        assert code == 2 and "--out must not be inside of the data" in said, said
    assert not [path for path in folder.iterdir() if path.suffix != ".jpg"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_comes_over_its_preset(tmp_path, name):
    file = tmp_path / "recipe.yaml"
    file.write_text("sources: [{path: photos}]\nquality: {min_luma: 0.3}\n")
    recipe = read_filter_recipe(file, ["curation.max_aspect=9"], name)
    assert (recipe.quality.min_luma, recipe.curation.max_aspect) == (0.3, 9)
    assert recipe.stages == PRESETS[name]["stages"] and recipe != FilterRecipe(sources=recipe.sources)
    assert read_filter_recipe("photos", (), name).sources[0].path == "photos"
    with pytest.raises(RecipeError, match="the preset must be of pretrain, refine, lora, got 'lorra'"):
        read_filter_recipe(file, (), "lorra")
