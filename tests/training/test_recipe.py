"""Recipes: YAML, dotted overrides, and sentences for everything that cannot work."""

from dataclasses import asdict

import pytest

from qwen_image_fast.training.recipe.curriculum import read_curriculum
from qwen_image_fast.training.recipe.fields import RecipeError, differences
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.read import build, read_recipe
from qwen_image_fast.training.recipe.vae import VaeRecipe
from qwen_image_fast.training.run import RECIPES, find_recipe


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    assert read_curriculum(path).name == f"{path.parent.name}-{path.stem}"
    assert find_recipe(f"{path.parent.name}/{path.stem}") == path


def test_overrides_reach_nested_fields(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("kind: flow\noptimizer: {lr: 1e-3}\n")
    overrides = ["optimizer.lr=2e-4", "data.tasks.ti2i=0.5", "data.buckets=[[64, 32]]", "model.compile=true"]
    recipe = read_recipe(path, overrides)
    assert isinstance(recipe, FlowRecipe)
    assert (recipe.optimizer.lr, recipe.data.tasks, recipe.data.buckets) == (2e-4, {"ti2i": 0.5}, [[64, 32]])
    assert recipe.model.compile is True
    assert build(asdict(recipe)) == recipe


def test_kind_chooses_the_dataclass():
    assert isinstance(build({"kind": "vae"}), VaeRecipe)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"optimizer": {"lrr": 1}}, "there is no field optimizer.lrr; did you mean optimizer.lr?"),
        ({"optimiser": {}}, "there is no field optimiser; did you mean optimizer?"),
        ({"zzz": 1}, "there is no field zzz; fields: kind, "),
        ({"kind": "gan"}, "kind must be one of flow, vae, got 'gan'"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": True}, "steps must be int, got True"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"data": 3}, "data must hold fields (source, "),
        ({"data": {"buckets": [[60, 64]]}}, "data.buckets must hold [height, width] in multiples of 16 pixels"),
        ({"data": {"tasks": {"t3i": 1}}}, "data.tasks must be of t2i, ti2i, recon, got 't3i'"),
        ({"data": {"tasks": {"t2i": 0}}}, "data.tasks must have weights of at least 0, one above 0"),
        ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule must be constant or cosine, got 'linear'"),
        ({"lora": {"rank": 4}}, "model.train_text_encoder must be false where lora.rank is above 0"),
        ({"kind": "vae", "mode": "decoder"}, "folder must name a VAE for mode decoder"),
        ([1], "the file must hold keys and values, got list"),
    ],
)
def test_what_is_refused(tree, sentence):
    with pytest.raises(RecipeError) as error:
        build(tree)
    assert sentence in str(error.value)


def test_bad_overrides_and_files(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: 3\n")
    with pytest.raises(RecipeError, match="an override must look like optimizer.lr=1e-3, got 'steps'"):
        read_recipe(path, ["steps"])
    with pytest.raises(RecipeError, match="steps has a value of its own"):
        read_recipe(path, ["steps.more=1"])
    with pytest.raises(RecipeError, match="there is no file nothing; shipped recipes: curriculum/report"):
        find_recipe("nothing")


def test_differences_name_the_fields():
    old = asdict(build({}))
    assert differences(old, old) == []
    assert differences(old, asdict(build({"optimizer": {"lr": 0.5}}))) == ["optimizer.lr: 0.001 -> 0.5"]
