"""Recipes: YAML, dotted overrides, and sentences for everything that cannot work."""

import typing
from dataclasses import asdict, is_dataclass

import pytest

from qwen_image_fast.training.recipe.curriculum import read_curriculum
from qwen_image_fast.training.recipe.fields import RecipeError, differences, read_tree
from qwen_image_fast.training.recipe.fitted import LARGE
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.meanings import meanings, written_out
from qwen_image_fast.training.recipe.names import (
    check_data,
    check_models,
    check_start,
    described,
    find_recipe,
    shipped,
    summary,
)
from qwen_image_fast.training.recipe.read import KINDS, build, read_recipe
from qwen_image_fast.training.recipe.vae import VaeRecipe


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_valid(name):
    assert read_curriculum(find_recipe(name)).name == name.replace("/", "-")


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
        ({"kind": "gan"}, "kind must be one of flow, vae, sft, dpo, grpo, nft, awm, got 'gan'"),
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
    with pytest.raises(
        RecipeError, match="there is no file nothing; shipped recipes: awm, dpo, edit-lora, grpo, lora, nft, sft, cur"
    ):
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
    path.write_text("model: {folder: new, train_text_encoder: false}")
    with pytest.raises(RecipeError, match=f"model.folder must name a model, such as Qwen/Qwen-Image, where {why}"):
        check_start(read_curriculum(path, changes))
    check_start(read_curriculum(path, [*changes, "model.folder=tiny"]))
    check_start(read_curriculum(path, ["model.train_text_encoder=true"]))
    with pytest.raises(RecipeError, match="no model is named: give --model .* tiny, a folder or a hub name .*; new"):
        check_start(read_curriculum(path, ["model.train_text_encoder=true", "model.folder="]))


def test_the_nearest_field_is_one_of_that_meaning():
    for wrong, right in (("learnrate", "lr"), ("learning_rate", "lr"), ("weigth_decay", "weight_decay")):
        with pytest.raises(RecipeError, match=f"no field optimizer.{wrong}; did you mean optimizer.{right}"):
            build({"optimizer": {wrong: 1}})
    with pytest.raises(RecipeError, match="no field optimizer.speed; fields: name, lr, "):
        build({"optimizer": {"speed": 1}})


def test_data_must_be_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 3")
    with pytest.raises(RecipeError, match="no data are named: give --images, .* --pairs, .* or data.source"):
        check_data(read_curriculum(path))
    check_data(read_curriculum(path, ["data.source=squares"]))


def groups(kind):
    """A dataclass of a recipe and all in it."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if is_dataclass(hint):
            yield from groups(hint)
        elif typing.get_args(hint) and is_dataclass(typing.get_args(hint)[0]):
            yield from groups(typing.get_args(hint)[0])


@pytest.mark.parametrize("kind", sorted({g for k in KINDS.values() for g in groups(k)}, key=lambda g: g.__name__))
def test_every_field_has_a_meaning(kind):
    plain = {name for name, hint in typing.get_type_hints(kind).items() if not is_dataclass(hint)}
    found = meanings(kind)
    assert plain <= found.keys()
    assert all(len(found[name]) > 5 for name in plain)


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_written_out_is_the_same_recipe(tmp_path, name):
    run = read_curriculum(find_recipe(name), [] if name == "tiny/vae" else ["model.folder=tiny"][: "vae" not in name])
    path = tmp_path / "written.yaml"
    path.write_text(written_out(run), encoding="utf-8")
    assert read_curriculum(path).stages[0].recipe == run.stages[0].recipe
    assert summary(name).endswith((".", "/model"))  # a whole sentence


def test_what_is_left_to_the_model(tmp_path):
    """Sizes, and all that is said for small models; what is said by name stays."""
    lora = find_recipe("lora")
    large, small = (read_curriculum(lora, [f"model.folder={name}"]).stages[0].recipe for name in ("a/b", "tiny"))
    assert large.data.buckets == LARGE and large.batch == 1 and large.model.gradient_checkpointing
    assert small.data.buckets == [[128, 128]] and small.batch == 8 and not small.model.gradient_checkpointing
    assert small.lora == large.lora
    said = read_curriculum(lora, ["model.folder=tiny", "batch=3", "data.buckets=[[64, 64]]"]).stages[0].recipe
    assert said.batch == 3 and said.data.buckets == [[64, 64]]


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


def test_files_that_are_no_recipe(tmp_path):
    """As `data filter` and `data annotate` read theirs, too."""
    with pytest.raises(RecipeError, match="is a folder, not a YAML file"):
        read_tree(tmp_path)
    (tmp_path / "gbk.yaml").write_bytes("name: 你好".encode("gbk"))
    with pytest.raises(ValueError, match="gbk.yaml is not text in UTF-8, as line 1 shows"):
        read_tree(tmp_path / "gbk.yaml")
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3")
    assert read_tree(tmp_path / "mark.yaml") == {"steps": 3}


@pytest.mark.parametrize(
    ("field", "value"), [("loss_weight", 0.5), ("keep", True), ("tasks", {"t2i": 0.5, "recon": 0.5})]
)
def test_parts_that_take_the_same_samples_differ_in_nothing_that_is_of_a_sample(field, value):
    from qwen_image_fast.training.recipe.data import DataRecipe, PartRecipe
    from qwen_image_fast.training.recipe.fields import RecipeError

    first, other = PartRecipe(source="a", name="one"), PartRecipe(source="a", name="two", weight=2.0)
    DataRecipe(mixture=[first, other]).check()
    second = PartRecipe(source="a", name="two", **{field: value})
    DataRecipe(mixture=[first, PartRecipe(source="b", name="two", **{field: value})]).check()
    with pytest.raises(RecipeError, match=r"same tasks, keep and loss_weight in parts that take the same samples.*two"):
        DataRecipe(mixture=[first, second]).check()
