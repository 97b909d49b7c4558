"""What validation sees, training never does: by the hash of the picture, over sources, caches and stages."""

import pytest
from data_pictures import noise
from source_helpers import files, write_pairs
from trainer_helpers import log_of, small_recipe, start

from qwen_image_fast.training.batches.batches import FlowBatches
from qwen_image_fast.training.batches.latents import LatentCache
from qwen_image_fast.training.data.screen import Rejected
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.run import cache_latents
from qwen_image_fast.training.sources.make import make_source, make_sources


def pictures(root, count=20, copies=()):
    names = {}
    for i in range(count):
        names |= {f"{i}.png": noise(i), f"{i}.txt": f"picture {i}"}
    for i in copies:
        names |= {f"copy of {i}.png": noise(i), f"copy of {i}.txt": f"copy of {i}"}
    return files(root, names)


def recipe_of(folder, root, **changes):
    return small_recipe(folder, data__source=str(root), data__options={}, data__text_dropout=0.0, **changes)


def split_of(folder, root, batches=20, **changes):
    """Captions that training and validation see."""
    recipe = recipe_of(folder, root, **changes)
    maker = FlowBatches(recipe, None, 64, sources=make_sources(recipe.data.parts))
    trained = {raw.caption for step in range(batches) for raw in maker.batch(step, 0)}
    return trained, {raw.caption for raw in maker.validation()}


def test_validation_takes_what_training_never_sees(folder, tmp_path):
    trained, validated = split_of(folder, pictures(tmp_path), data__hold_out=0.1)
    assert len(trained) == 18 and len(validated) == 2 and not trained & validated
    # The names and the number of the others do not decide it.
    (tmp_path / "0.png").rename(tmp_path / "z.png")
    (tmp_path / "0.txt").rename(tmp_path / "z.txt")
    files(tmp_path, {"new.png": noise(99), "new.txt": "new"})
    again = split_of(folder, tmp_path, data__hold_out=0.1)[1]
    assert len(again & validated) >= 1


def test_copies_fall_on_the_same_side(folder, tmp_path):
    held = split_of(folder, pictures(tmp_path / "a"), data__hold_out=0.1)[1]
    numbers = [int(caption.split()[1]) for caption in held]
    trained, validated = split_of(folder, pictures(tmp_path / "b", copies=numbers), data__hold_out=0.1)
    assert trained == {f"picture {i}" for i in range(20) if i not in numbers}
    assert {int(caption.split()[-1]) for caption in validated} == set(numbers)


@pytest.mark.parametrize("count, share, held", [(19, 0.05, 0), (20, 0.05, 1), (10, 0.3, 3), (2, 0.9, 1), (20, 0.0, 0)])
def test_how_many(tmp_path, count, share, held):
    source = make_source(DataRecipe(source=str(pictures(tmp_path, count)), hold_out=share))
    assert len(source.held) == held
    assert (f"{held} held out" if held else "none held out") in source.said()[0]


def test_two_sources_of_one_run_hold_the_same_pictures_out(folder, tmp_path):
    """The second has copies of the first's held-out pictures, and others."""
    first, second = pictures(tmp_path / "a"), pictures(tmp_path / "b", 30)
    mixture = [{"name": "a", "source": str(first)}, {"name": "b", "source": str(second), "hold_out": 0.0}]
    recipe = small_recipe(folder, data__mixture=mixture, data__hold_out=0.2, data__text_dropout=0.0)
    maker = FlowBatches(recipe, None, 64, sources=make_sources(recipe.data.parts))
    trained = {raw.caption for step in range(60) for raw in maker.batch(step, 0)}
    validated = {raw.caption for raw in maker.validation()}
    assert validated and not trained & validated and len(trained) == 26


def test_pairs_are_held_out_with_all_their_pictures(tmp_path):
    """The target of one is the beginning of another."""
    names = {}
    for i in range(10):
        names |= {f"before/{i}.png": noise(i), f"after/{i}.png": noise(i + 1), f"{i}.txt": f"edit {i}"}
    recipe = DataRecipe(source=str(files(tmp_path, names)), tasks={"ti2i": 1.0}, hold_out=0.1)
    source = make_source(recipe)
    (held,) = {source.held_out(i, True).caption for i in range(3)}
    assert source.held_out(0, True).references
    number = int(held.split()[1])
    expected = {f"edit {i}" for i in range(10) if i not in (number, number + 1)}
    assert {source.edit(0, i).caption for i in range(20)} == expected


def test_copies_that_were_not_looked_at_are_left_out(tmp_path, monkeypatch):
    from qwen_image_fast.training.sources import look

    monkeypatch.setattr(look, "MOST", 20)
    source = make_source(DataRecipe(source=str(pictures(tmp_path, 20, copies=range(20))), hold_out=0.1))
    seen, reasons = set(), []
    for i in range(200):
        try:
            seen.add(source.sample(0, i).image.tobytes())
        except Rejected as error:
            reasons.append(error.reason)
    held = {source.held_out(i, False).image.tobytes() for i in range(4)}
    assert len(held) == 4 and not seen & held and len(seen) == 16
    assert all(reason.startswith("held_out: a copy") for reason in reasons)


def test_a_run_says_what_is_held_out_and_validates_on_it(folder, tmp_path):
    root = pictures(tmp_path / "f")
    recipe = recipe_of(folder, root, steps=2, log__validate_every=1)
    trainer = start(recipe, tmp_path / "run")
    trainer.run()
    assert len(log_of(tmp_path / "run", "validation_loss")) == 2
    alone = start(recipe_of(folder, root, steps=2, log__validate_every=1, data__hold_out=0.0), tmp_path / "alone")
    alone.run()
    assert not log_of(tmp_path / "alone", "validation_loss")


def test_edits_to_look_at_are_held_out(tmp_path, folder):
    recipe = small_recipe(folder, data__source=str(write_pairs(tmp_path / "p", "folders")), data__options={},
                          data__tasks={"ti2i": 1.0}, data__hold_out=0.4)  # fmt: skip
    maker = FlowBatches(recipe, None, 64, sources=make_sources(recipe.data.parts))
    held = {raw.caption for raw in maker.validation()}
    assert {sample.caption for sample in maker.edits(4)[0]} == held and len(held) == 1


def test_a_cache_keeps_them_apart(folder, tmp_path):
    root, path = pictures(tmp_path / "f"), tmp_path / "recipe.yaml"
    path.write_text("kind: flow")
    changes = [f"data.source={root}", "data.hold_out=0.1", "data.buckets=[[32, 32]]", f"model.folder={folder}"]
    cache_latents(path, [*changes, "device=cpu", "log.validation_samples=3"], tmp_path / "cache", 25)
    cache = LatentCache(tmp_path / "cache")
    assert len(cache) == 28 and cache.meta["held_out"] == 3
    recipe = recipe_of(folder, root, data__cache=str(tmp_path / "cache"), log__validation_samples=2)
    maker = FlowBatches(recipe, None, 64, cache)
    trained = {raw.caption for step in range(20) for raw in maker.batch(step, 0)}
    validated = {raw.caption for raw in maker.validation()}
    assert len(trained) == 18 and len(validated) == 2 and not trained & validated


def test_a_share_of_all_is_refused():
    with pytest.raises(RecipeError, match=r"data.hold_out must be in \[0, 1\), got 1.0"):
        DataRecipe(hold_out=1.0).check()
