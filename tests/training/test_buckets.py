"""Sizes that pictures are trained at, without enlarging them, and what a run says about it."""

import csv

import pytest
from source_helpers import files, picture
from trainer_helpers import small_recipe

from qwen_image_fast.training.batches.batches import FlowBatches, to_buckets
from qwen_image_fast.training.recipe.curriculum import one_stage
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.buckets import covering, fit, size_for, sizes_for
from qwen_image_fast.training.sources.survey import said_of, sources_of

BUCKETS = [[64, 64], [48, 80], [80, 48], [128, 128]]


@pytest.mark.parametrize(
    "shape, upscale, size",
    [
        ((200, 200), False, (128, 128)),
        ((100, 100), False, (64, 64)),
        ((50, 50), False, (48, 48)),
        ((50, 50), True, (64, 64)),
        ((40, 90), False, (32, 64)),
        ((10, 10), False, (16, 16)),
        ((96, 160), False, (48, 80)),
    ],
)
def test_no_picture_is_enlarged_unless_asked(shape, upscale, size):
    assert size_for(*shape, BUCKETS, upscale) == size
    assert upscale or min(shape) < 16 or covering(shape, size)[0] <= 1


def test_sides_are_areas_in_nine_shapes():
    DataRecipe(sides=[256, 512], buckets=[]).check()
    data = DataRecipe(sides=[256, 512])
    data.check()
    assert len(data.sizes) == 18 and [256, 256] in data.sizes and [416, 624] in data.sizes
    for number, (height, width) in enumerate(data.sizes):
        side = (256, 512)[number // 9]
        assert height % 16 == width % 16 == 0 and abs(height * width / side**2 - 1) < 0.06
    # Of one shape the area decides, not the rounding of the sides.
    for ratio in (3 / 4, 4 / 3, 9 / 16, 16 / 9, 1 / 3, 3.0):
        large, small = ((int(900 * ratio**0.5 * k), int(900 / ratio**0.5 * k)) for k in (1, 0.4))
        assert abs(size_for(*large, data.sizes, False)[0] / large[0] * 900 / 512 - 1) < 0.1
        assert abs(size_for(*small, data.sizes, False)[0] / small[0] * 360 / 256 - 1) < 0.1
    with pytest.raises(RecipeError, match=r"data.buckets must be \[\] where there are data.sides"):
        DataRecipe(sides=[256], buckets=[[32, 32]]).check()
    with pytest.raises(RecipeError, match="data.sides must be multiples of 16 pixels"):
        DataRecipe(sides=[250]).check()


def test_a_reference_of_the_targets_shape_stays_in_place():
    assert sizes_for([(100, 100), (300, 303), (80, 50)], BUCKETS, False) == [(64, 64), (64, 64), (80, 48)]
    images, shapes = to_buckets([fit(np_picture(100, 100), (100, 100)), np_picture(300, 303)],
                                DataRecipe(buckets=BUCKETS))  # fmt: skip
    assert [image.shape for image in images] == [(64, 64, 3)] * 2 and shapes == [(1, 4, 4)] * 2


def np_picture(height, width):
    import numpy as np

    return np.asarray(picture((9, 9, 9), (width, height)))


def test_what_is_cut_off_is_said_and_written(tmp_path, folder):
    for name, size in {"a": (100, 100), "b": (100, 200), "c": (40, 40), "d": (40, 96)}.items():
        picture((1, 2, len(name) + size[1]), size).save(files(tmp_path / "f", {f"{name}.txt": name}) / f"{name}.png")
    recipe = small_recipe(folder, data__source=str(tmp_path / "f"), data__options={}, data__buckets=BUCKETS,
                          log__validate_every=1)  # fmt: skip
    said = "\n".join(said_of(one_stage(recipe), sources_of(one_stage(recipe)), tmp_path / "run"))
    assert "4 pictures, none held out for validation" in said and "so there is no validation loss" in said
    assert "1 at 64 x 64: nothing cut off" in said
    assert f"1 at 80 x 48: 17% cut off on average, 17% at most ({tmp_path}/f/b.png)" in said
    assert (
        f"warning: 2 are smaller than the buckets and are trained at their own size, down to 32 x 32 ({tmp_path}"
        in said
    )
    with open(tmp_path / "run" / "pictures.csv", newline="") as file:
        rows = {row["picture"][-5]: row for row in csv.DictReader(file)}
    assert rows.keys() == set("abcd") and (rows["b"]["trained_height"], rows["b"]["cropped"]) == ("80", "0.1667")
    recipe.data.upscale = True
    said = "\n".join(said_of(one_stage(recipe), sources_of(one_stage(recipe)), tmp_path / "run"))
    assert f"warning: 3 are enlarged, up to 1.6 times ({tmp_path}/f/c.png): they look soft" in said


def test_what_is_smaller_than_a_token_is_left_out(tmp_path, folder):
    """Unless it may be enlarged."""
    for name, size in {"a": (1, 1), "b": (64, 64), "c": (8, 64)}.items():
        picture((1, 2, size[1]), size).save(files(tmp_path / "f", {f"{name}.txt": name}) / f"{name}.png")
    recipe = small_recipe(folder, data__source=str(tmp_path / "f"), data__options={}, data__buckets=BUCKETS)
    run = one_stage(recipe)
    said = "\n".join(said_of(run, sources_of(run), tmp_path / "run"))
    assert f"{tmp_path}/f/a.png will be left out: it is 1 x 1 pixels, less than 16 on a side; data.upscale=true" in said
    assert "(2 pictures are too small)" in said and "enlarged," not in said
    made = FlowBatches(recipe, None, 16, sources=sources_of(run)).batch(0, 0)
    assert {raw.caption for raw in made} == {"b"}
    assert any(why.startswith("too_small: it is 1 x 1 pixels") for _, _, why in made.rejected)
    recipe.data.upscale = True
    said = "\n".join(said_of(run, sources_of(run), tmp_path / "run"))
    assert "left out" not in said and f"up to 64.0 times ({tmp_path}/f/a.png)" in said
    assert {raw.caption for raw in FlowBatches(recipe, None, 16, sources=sources_of(run)).batch(0, 0)} > {"b"}


def test_edits_of_different_sizes_are_said(tmp_path, folder):
    root = tmp_path / "p"
    for name, size in {
        "before/a": (200, 200),
        "after/a": (100, 100),
        "before/b": (100, 60),
        "after/b": (100, 100),
    }.items():
        files(root, {f"{name[-1]}.txt": "x", f"{name}.txt": "x"})
        picture((1, len(name), size[1]), size).save(root / f"{name}.png")
    for name in ("before/a", "before/b", "after/a", "after/b"):
        (root / f"{name}.txt").unlink()
    recipe = small_recipe(
        folder, data__source=str(root), data__options={}, data__buckets=BUCKETS, data__tasks={"ti2i": 1}
    )
    said = "\n".join(said_of(one_stage(recipe), sources_of(one_stage(recipe)), tmp_path / "run"))
    assert "1 references are scaled to the size of their target, such as 200 x 200 for 100 x 100" in said
    assert "1 references have another shape than their target and are cut on their own" in said
