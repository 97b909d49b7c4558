"""Fields of a recipe that change nothing are said, those that change something are not."""

import dataclasses

import pytest
from data_pictures import encoded, photos
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.data import without_effect
from qwen_image_fast.training.data.judge import limits
from qwen_image_fast.training.data.recipe import AnnotateRecipe, FilterRecipe, SourceRecipe, preset_recipe
from qwen_image_fast.training.data.screen import Screen
from qwen_image_fast.training.recipe.fields import convert, set_dotted

HALF = {"Nature": 0.5, "People": 0.5}
# Always of effect: the run's own, and what every picture is decoded by.
ALWAYS = {"sheet", "shard_records", "curation.max_pixels"}


def names_of(tree, prefix=""):
    """Dotted names of all fields of all groups of a recipe."""
    groups = {name for name, value in tree.items() if isinstance(value, dict) and name not in ("sets", "categories")}
    own = {prefix + name for name in tree if name not in groups}
    return own.union(*(names_of(tree[name], f"{name}.") for name in groups))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"balance": {"tail": 500}}, "balance.tail has no effect: balance.power is 1, which keeps all of every node"),
        ({"balance": {"tail": 500, "power": 0.5}}, None),
        ({"balance": {"best_by": "luma"}}, "balance.best_by has no effect: balance.power is 1"),
        ({"balance": {"best_by": "luma", "power": 0.5}}, None),
        ({"balance": {"power": 0.5}, "stages": [1, 7]}, "balance.best_by: clarity is not measured in this run"),
        ({"balance": {"power": 0.5}, "stages": [1, 2]}, "balance.power has no effect: taxonomy is of stage 7"),
        ({"balance": {"categories": HALF}, "stages": [1, 7]}, "balance.categories has no effect: category_balance is"),
        ({"balance": {"categories": HALF}, "seed": 3}, None),
        ({"seed": 3}, "seed has no effect: nothing is drawn"),
        ({"seed": 3, "balance": {"power": 0.5}}, None),
        ({"seed": 3, "captions": {"sets": {"raw": 1}}}, None),
        ({"quality": {"min_luma": 0.1}, "without": ["luma"]}, "quality.min_luma has no effect: luma is in `without`"),
        ({"quality": {"min_luma": 0.1}, "stages": [1]}, "quality.min_luma has no effect: luma is of stage 2, which"),
        ({"quality": {"min_entropy": 1.0}, "stages": [1]}, None),  # plain pictures are not compared
        ({"quality": {"min_entropy": 1.0}, "stages": [1], "without": ["near_duplicate"]}, "quality.min_entropy has no"),
        ({"without": ["luma"], "stages": [1]}, "without: luma has no effect: stage 2 is not run"),
        ({"captions": {"min_alignment": 0.3}}, "captions.min_alignment has no effect: there is no model"),
        ({"captions": {"min_alignment": 0.3, "siglip": "models/siglip"}}, None),
        ({"ray": {"cpus": 2.0}}, "ray.cpus has no effect: the engine is not ray"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said(tree, expected):
    said = list(without_effect.of_filters(convert(tree, FilterRecipe, ""), FilterRecipe()))
    assert [sentence.startswith(expected or "") for sentence in said] == [True] * (expected is not None), said


def test_ray_has_an_effect_on_ray_and_a_preset_says_nothing_of_its_own():
    recipe = convert({"ray": {"cpus": 2.0}}, FilterRecipe, "")
    assert not list(without_effect.of_filters(recipe, FilterRecipe(), engine="ray"))
    for preset in ("", "pretrain", "refine", "lora"):
        assert not list(without_effect.of_filters(preset_recipe(preset), preset_recipe(preset)))


def test_every_field_is_read_by_the_filters_that_the_table_names():
    """Against the limits that filters are built with: each number of the recipe moves those of its readers alone."""
    names = names_of(dataclasses.asdict(FilterRecipe())) - {"sources", "stages", "without"}
    special = {name for name in names if name.startswith("ray.")} | {"seed", "captions.sets"}
    assert names == {*without_effect._READ_BY} | ALWAYS | special
    still = set()
    for name, readers in without_effect._READ_BY.items():
        tree = dataclasses.asdict(FilterRecipe())
        group, _, field = name.partition(".")
        if isinstance(tree[group][field], (int, float)):
            set_dotted(tree, name, type(tree[group][field])(tree[group][field] + 1))
            before, after = limits(FilterRecipe()), limits(convert(tree, FilterRecipe, ""))
            found = {one for one in before if before[one] != after[one]}
            assert found <= {*readers}, name
            still |= set() if found else {name}
    assert still == {"balance.tail", "balance.power"}


def test_while_training_what_needs_all_records_is_said():
    filters = {"stages": [1], "curation": {"duplicate_bits": 2, "min_side": 32}, "quality": {"min_entropy": 1.0}}
    assert list(Screen(filters).said()) == [
        "data.filters: curation.duplicate_bits has no effect: it needs all records, as `data filter` has them",
        "data.filters: quality.min_entropy has no effect: rgb_entropy is of stage 2, which is not run",
    ]
    assert [*Screen({"sheet": 0}).said()] == [
        "data.filters: sheet has no effect: it is for `data filter`, which writes a result"
    ]
    assert not list(Screen({}).said())


def test_columns_of_folders_without_tables_and_keys_without_an_endpoint(tmp_path):
    (tmp_path / "cat.png").write_bytes(encoded(photos()["chelsea.png"]))
    sources = [SourceRecipe(str(tmp_path), image_column="picture")]
    (said,) = without_effect.of_sources(sources)
    assert said == f"sources.0.image_column has no effect: {tmp_path} has no table with columns"
    (tmp_path / "table.csv").write_text("picture\ncat.png\n")
    assert not list(without_effect.of_sources(sources))
    recipe = AnnotateRecipe(model="folder", api_key_file="key")
    assert list(without_effect.of_annotation(recipe)) == [
        "api_key_file has no effect: without an endpoint, the model runs here"
    ]
    assert not list(without_effect.of_annotation(dataclasses.replace(recipe, endpoint="http://localhost/v1")))


def test_the_command_says_so(tmp_path):
    (tmp_path / "cat.png").write_bytes(encoded(photos()["chelsea.png"]))
    command = ["data", "filter", str(tmp_path), "--preset", "lora", "--dry-run", "balance.tail=7"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "recipe: balance.tail has no effect: taxonomy is of stage 7, which is not run" in result.output
