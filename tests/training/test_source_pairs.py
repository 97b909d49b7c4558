"""Edits of one's own: pairs in folders and tables, masks, several references."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from source_helpers import COLOURS, colours_of, files, picture, write_pairs
from trainer_helpers import small_recipe, start

from qwen_image_fast.training.batches.batches import FlowBatches
from qwen_image_fast.training.recipe.captions import CaptionsRecipe
from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.tasks.flow import flow_losses


def edits_of(source, **fields):
    return make_source(DataRecipe(source=str(source), tasks={"ti2i": 1.0}, **fields))


@pytest.mark.parametrize("layout, references", [("folders", 1), ("names", 1), ("table", 2)])
def test_pairs(tmp_path, layout, references):
    recipe = DataRecipe(source=str(write_pairs(tmp_path / "pairs", layout)), tasks={"ti2i": 1.0})
    source = make_source(recipe)
    found = colours_of(source, 3, "edit")
    for i, colour in enumerate(COLOURS[:3]):
        assert np.abs(np.subtract(found[f"colour {i}"], colour)).max() <= 3  # JPEG
    made = source.edit(0, 0)
    assert len(made.references) == references
    assert all(r.shape == (32, 48, 3) and (r == 9).all() for r in made.references)
    assert not source.sample(0, 0).references  # of a reconstruction
    with pytest.raises(RecipeError, match="and .* has pairs of pictures, which teach edits: give it as --pairs"):
        make_source(DataRecipe(source=recipe.source))


def test_capital_suffixes(tmp_path):
    root = files(tmp_path / "f", {"a.before.PNG": 0, "a.after.PNG": 1, "a.TXT": "paint it", "a.mask.PNG": 2})
    source = edits_of(root)
    assert source.edit(0, 0).caption == "paint it" and source.catalogue.pairs[0].mask is not None
    assert not source.catalogue.skipped


def test_one_instruction_for_all_pairs(tmp_path):
    root = write_pairs(tmp_path / "pairs", "folders")
    for text in root.glob("*.txt"):
        text.unlink()
    for_all = CaptionsRecipe(default="paint it")
    assert edits_of(root, captions=for_all).edit(0, 0).caption == "paint it"
    with pytest.raises(
        RecipeError, match=r"needs its instruction, .*p0.png has none or an empty one \(3 of 3\): write it"
    ):
        edits_of(root)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"image": "a.png", "references": "gone.png", "instruction": "x"}', "names .*gone.png, which is not there"),
        (
            '{"image": "a.png", "references": ["b.png"], "instruction": " "}',
            "needs its instruction, pairs.jsonl:1 has none",
        ),
    ],
)
def test_tables_of_pairs_that_are_wrong(tmp_path, line, message):
    files(tmp_path, {"a.png": 0, "b.png": 0, "pairs.jsonl": line})
    with pytest.raises(RecipeError, match=message):
        edits_of(tmp_path)


def test_a_picture_without_its_partner_and_two_of_one_name(tmp_path):
    root = write_pairs(tmp_path / "pairs", "folders")
    (root / "before" / "p1.png").unlink()
    with pytest.raises(RecipeError, match="every picture needs its partner, .*after/p1.png has none"):
        edits_of(root)
    picture(COLOURS[0]).save(root / "after" / "p0.webp")
    with pytest.raises(RecipeError, match="p0.webp and p0.png are two pictures of one name"):
        edits_of(root)


def test_a_run_learns_from_pairs(folder, tmp_path):
    root = write_pairs(tmp_path / "pairs", "names")
    recipe = small_recipe(folder, steps=2, data__source=str(root), data__options={}, data__tasks={"ti2i": 1.0})
    trainer = start(recipe, tmp_path / "run")
    trainer.run()
    assert trainer.step == 2


def test_tables_of_edits_with_columns_of_their_own_masks_and_several_references(tmp_path):
    rows = [
        {
            "edited": f"{i}.png",
            "first": "3.png",
            "second": "4.png" if i else None,
            "say": f"colour {i}",
            "mask": "m.png",
        }
        for i in range(3)
    ]
    names = {f"{i}.png": i for i in range(4)} | {"4.png": 3}
    files(tmp_path, {**names, "t.jsonl": "\n".join(map(json.dumps, rows))})
    mask = np.zeros((8, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    options = {"image_column": "edited", "reference_columns": ["first", "second"], "caption_column": "say"}
    source = edits_of(tmp_path / "t.jsonl", options=options)
    made = [source.edit(0, i) for i in range(3)]
    assert sorted(len(sample.references) for sample in made) == [1, 2, 2]
    assert {sample.caption for sample in made} == {f"colour {i}" for i in range(3)}
    assert all(sample.mask.shape == (32, 32) and sample.mask[:, 0].max() == 0 for sample in made)
    several = edits_of(tmp_path / "t.jsonl", options={**options, "references": [2, 3]})
    assert {several.edit(0, i).caption for i in range(4)} == {"colour 1", "colour 2"}
    with pytest.raises(RecipeError, match="no row of .* has 5 to 6 references"):
        edits_of(tmp_path / "t.jsonl", options={**options, "references": [5, 6]})
    with pytest.raises(RecipeError, match="reference_columns must be a column of .*; got 'third'"):
        edits_of(tmp_path / "t.jsonl", options={**options, "reference_columns": ["third"]})


def test_masks_of_folders_weigh_the_tokens(folder, tmp_path):
    root = write_pairs(tmp_path / "pairs", "names")
    mask = np.zeros((32, 32), np.uint8)
    mask[:16, 16:] = 255
    Image.fromarray(mask).save(root / "p1.mask.png")
    recipe = small_recipe(folder, batch=3, data__source=str(root), data__options={}, data__tasks={"ti2i": 1.0},
                          data__mask_floor=0.25)  # fmt: skip
    task = start(recipe, tmp_path / "run").task
    batch = task.maker.batch(0, 0)
    weights = {raw.caption: raw.token_weights for raw in batch if raw.caption}
    assert weights.pop("colour 1").tolist() == [0.25, 1.0, 0.25, 0.25] and set(weights.values()) <= {None}
    samples, texts = task.to_latents(batch), task.texts(batch)
    losses, plain = flow_losses(task.transformer, samples, texts), []
    for sample in samples:
        sample.weights, kept = None, sample.weights
        plain.append(kept)
    unweighted = flow_losses(task.transformer, samples, texts)
    for kept, one, other in zip(plain, losses, unweighted):
        assert (kept is None) == bool(one == other)
    place = next(i for i, kept in enumerate(plain) if kept is not None)
    # Its loss is the mean over single tokens' losses by their weights.
    single = []
    for token in range(4):
        samples[place].weights = torch.eye(4)[token]
        single.append(flow_losses(task.transformer, samples, texts)[place])
    expected = (torch.stack(single) * plain[place]).sum() / plain[place].sum()
    assert torch.allclose(losses[place], expected, rtol=1e-5)
    Image.fromarray(mask * 0).save(root / "p1.mask.png")
    with pytest.raises(
        RecipeError, match=r"p1.mask.png: a mask must be white where the loss counts, and this one has no"
    ):
        edits_of(root)


def test_reconstructions_and_edits_by_share(folder, tmp_path):
    root = write_pairs(tmp_path / "pairs", "folders")
    recipe = small_recipe(folder, batch=64, data__source=str(root), data__options={},
                          data__tasks={"ti2i": 0.75, "recon": 0.25})  # fmt: skip
    batch = FlowBatches(recipe, make_source(recipe.data), 64).batch(0, 0)
    recon = [raw for raw in batch if raw.task == "recon"]
    assert 6 <= len(recon) <= 28 and len(batch) == 64
    assert all(np.array_equal(raw.images[0], raw.images[1]) for raw in recon)


def test_parts_whose_loss_counts_less(folder, tmp_path):
    """Pictures of the class beside those of the thing: prior preservation."""
    parts = [{"name": "own", "source": "squares", "options": {"size": 32}},
             {"name": "class", "source": "squares", "options": {"size": 64}, "loss_weight": 0.25}]  # fmt: skip
    recipe = small_recipe(folder, batch=16, data__mixture=parts)
    task = start(recipe, tmp_path / "run").task
    batch = task.maker.batch(0, 0)
    weights = torch.tensor([raw.weight for raw in batch])
    assert set(weights.tolist()) == {1.0, 0.25}
    losses = task.loss(batch)
    assert torch.allclose(losses.total, (losses.per_sample * weights).mean())
