"""Recipes: YAML, dotted overrides, and sentences for everything that cannot work."""

from dataclasses import asdict

import pytest

from qwen_image_fast.training.recipe.curriculum import read_curriculum
from qwen_image_fast.training.recipe.fields import RecipeError, differences
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.names import RECIPES, check_data, check_models, check_start, described, find_recipe
from qwen_image_fast.training.recipe.read import build, read_recipe
from qwen_image_fast.training.recipe.vae import VaeRecipe


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
        (
            {"optimizer": {"schedule": "linear"}},
            "optimizer.schedule must be of constant, cosine, cosine-restarts, got 'linear'",
        ),
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


def test_the_nearest_name_is_offered_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, near in (("tiny/vea", "tiny/vae"), ("recipe.yml", "recipe.yaml")):
        (tmp_path / "recipe.yaml").write_text("steps: 3")
        with pytest.raises(RecipeError, match=f"did you mean {near}"):
            find_recipe(name)
    for field, name, near in (("model.folder", "tinny", "tiny"), ("model.vae", "photo", "photos")):
        with pytest.raises(RecipeError, match=f"recipe: {field}: there is no folder {name}, .* did you mean {near}"):
            check_models(read_curriculum("recipe.yaml", [f"{field}={name}"]))
    with pytest.raises(RecipeError, match="must be the folder of a pipeline, photos has no model_index.json"):
        check_models(read_curriculum("recipe.yaml", ["model.folder=photos"]))
    check_models(read_curriculum("recipe.yaml", ["model.folder=Qwen/Qwen-Image", "model.vae=tiny"]))
    for source, near in (("sqares", "squares"), ("phots", "photos")):
        with pytest.raises(RecipeError, match=f"data.source must be .*, there is no {source}; did you mean {near}"):
            check_data(read_curriculum("recipe.yaml", [f"data.source={source}"]))
    with pytest.raises(RecipeError, match="data.cache: there is no folder phtos; did you mean photos"):
        check_data(read_curriculum("recipe.yaml", ["data.cache=phtos"]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [(["lora.rank=4"], "lora.rank is above 0"), ([], "model.train_text_encoder is false")],
)
def test_a_new_model_is_trained_whole(tmp_path, changes, why):
    """Its weights are random: an adapter on them, or states of a random text encoder, would be nothing."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {train_text_encoder: false}")
    with pytest.raises(RecipeError, match=f"model.folder must name a model, such as Qwen/Qwen-Image, where {why}"):
        check_start(read_curriculum(path, changes))
    check_start(read_curriculum(path, [*changes, "model.folder=tiny"]))
    check_start(read_curriculum(path, ["model.train_text_encoder=true"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["kind=vae"], "a new VAE"),
        ([], "a new model, its VAE random too"),
        (["model.vae=tiny"], "a new model with the VAE tiny"),
        (["model.folder=a/b", "model.vae=~/vae"], "a/b, ~/vae"),
    ],
)
def test_what_is_loaded_is_said(tmp_path, changes, said):
    (tmp_path / "recipe.yaml").write_text("steps: 3")
    assert described(read_curriculum(tmp_path / "recipe.yaml", changes)) == said


def test_a_colon_without_a_space():
    with pytest.raises(RecipeError, match="data.tasks needs a space behind the colon: ti2i: 1"):
        build({"data": {"tasks": {"ti2i:1": None}}})
