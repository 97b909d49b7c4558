"""Pairs and prompts of files: what is learnt from them, and what is wrong with them before a model is loaded."""

import json

import pytest
import torch
from PIL import Image
from post_helpers import BRIGHT, start_post
from trainer_helpers import log_of, small_recipe

from qwen_image_fast.training.batches.preferred import PairBatches
from qwen_image_fast.training.recipe.curriculum import one_stage
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.names import check_data
from qwen_image_fast.training.run import make_task
from qwen_image_fast.training.sources.lines import prompt_lines


@pytest.fixture
def pairs(tmp_path):
    """Four pairs: a red square is preferred to a blue one."""
    lines = []
    for n in range(4):
        for name, colour in (("good", (220, 30 * n, 0)), ("bad", (0, 30 * n, 220))):
            Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}{n}.png")
        lines.append({"prompt": f"a square {n}", "chosen": f"good{n}.png", "rejected": f"bad{n}.png"})
    return written(tmp_path, lines)


def written(folder, lines, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def recipe_of(folder, kind, path, **changes):
    return small_recipe(folder, kind=kind, pairs=str(path), model__train_text_encoder=False, data__source=None,
                        data__options={}, data__upscale=True, **{"batch": 2, **changes})  # fmt: skip


def test_dpo_orders_given_pairs(folder, tmp_path, pairs):
    recipe = recipe_of(folder, "dpo", pairs, steps=6, optimizer__ema=0.5, log__every=1)
    start_post(recipe, tmp_path / "run").run()
    losses = log_of(tmp_path / "run")
    assert losses[0] == torch.tensor(2.0).log().item() and losses[-1] < losses[0]
    assert log_of(tmp_path / "run", "implicit_accuracy")[-1] == 1


def test_a_pair_has_one_noise_and_an_epoch_each_pair_once(folder, pairs):
    made = PairBatches(recipe_of(folder, "dpo", pairs), 64)
    batches = [made.batch(step, 0) for step in range(2)]
    for raw in (batches[0][:2], batches[1][2:]):
        assert torch.equal(raw[0].noise, raw[1].noise) and raw[0].sigma == raw[1].sigma
        assert raw[0].images[0].mean(axis=(0, 1))[0] > 200 > 100 > raw[1].images[0].mean(axis=(0, 1))[0]
    assert len({raw.caption for batch in batches for raw in batch}) == 4
    assert not torch.equal(batches[0][0].noise, batches[0][2].noise)


def test_sft_learns_from_the_chosen_ones(folder, tmp_path, pairs):
    recipe = recipe_of(folder, "sft", pairs, steps=2)
    assert [raw.images[0][0, 0, 0] for raw in PairBatches(recipe, 64).batch(0, 0)] == [220, 220]
    start_post(recipe, tmp_path / "run").run()
    assert len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("not json", "line 2 of .* must be JSON"),
        ([1], "line 2 of .* must be a JSON object"),
        ({"chosen": "good0.png", "rejected": "bad0.png"}, 'line 2 of .* must have a text "prompt", it has chosen'),
        ({"prompt": "p", "chosen": "good0.png"}, 'must have a text "rejected", it has prompt, chosen'),
        ({"prompt": "p", "chosen": "good0.png", "rejected": "gone.png"}, "there is no picture .*gone.png"),
        ({"prompt": "p", "chosen": "good0.png", "rejected": "pairs.jsonl"}, "pairs.jsonl is no picture: cannot"),
        ({"prompt": "p", "chosen": "bad0.png", "rejected": "bad0.png"}, "must be two pictures"),
        (
            {"prompt": "p", "chosen": "good0.png", "rejected": "bad0.png", "references": ["bad1.png"]},
            "data.tasks must be {ti2i: 1}: line 2 of .* has references",
        ),
    ],
)
def test_wrong_lines_of_pairs(folder, tmp_path, pairs, line, sentence):
    good = pairs.read_text().splitlines()[0]
    path = written(tmp_path, [good, line])
    with pytest.raises(RecipeError, match=sentence):
        make_task(one_stage(recipe_of(folder, "dpo", path)), tmp_path / "run")


def test_pictures_of_two_shapes(folder, tmp_path, pairs):
    Image.new("RGB", (80, 40)).save(tmp_path / "wide.png")
    path = written(tmp_path, [{"prompt": "p", "chosen": "good0.png", "rejected": "wide.png"}])
    recipe = recipe_of(folder, "dpo", path, data__buckets=[[32, 32], [32, 64]])
    with pytest.raises(ValueError, match="chosen and rejected must have one shape"):
        PairBatches(recipe, 64).batch(0, 0)


# Prompts


def prompts_recipe(folder, path, **changes):
    given = {"rewards": BRIGHT, "rollout__steps": 2, "rollout__count": 2, "rollout__group": 2,
             "rollout__prompts": str(path), **changes}  # fmt: skip
    return small_recipe(folder, kind="nft", model__train_text_encoder=False, data__source=None, data__options={},
                        optimizer__ema=0.0, steps=2, batch=2, **given)  # fmt: skip


def test_prompts_of_a_file(folder, tmp_path):
    """The last ones are held out; the others come once in an epoch."""
    path = written(
        tmp_path, [f"a square {n}" for n in range(6)] + [{"prompt": "last", "texts": ["A"], "tag": 3}], "p.txt"
    )
    recipe = prompts_recipe(folder, path, guards={"every": 1, "count": 3, "dead": 0, "held_out": 0})
    trainer = start_post(recipe, tmp_path / "run")
    giver = trainer.task.giver
    assert [prompt.caption for prompt in giver.held_out()] == ["a square 4", "a square 5", "last"]
    assert giver.held_out()[-1].asked.texts == ("A",) and giver.held_out()[-1].asked.fields == {"tag": 3}
    seen = [prompt.caption for number in range(2) for prompt in giver.round(number)]
    assert sorted(seen) == [f"a square {n}" for n in range(4)]
    trainer.run()
    assert len(log_of(tmp_path / "run", "held_out_reward")) == 2


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"tag": "single_object"}', 'line 1 of .* must have a text "prompt", it has tag'),
        ('{"prompt": "p", "texts": "a"}', "texts must be a list of texts"),
        ('{"prompt"', "must be JSON"),
        ('{"prompt": "p", "colours": {"text": 3}}', "colours must be such as"),
        ('{"prompt": "p", "boxes": [[0, 0, 9]]}', "boxes must be lists of left, top, right and bottom in whole pixels"),
        ('{"prompt": "p", "boxes": [[0, 0, 9, NaN]]}', "boxes must be lists of .* in whole pixels"),
        ('{"prompt": "p", "boxes": [[9, 0, 9, 9]]}', "boxes must be lists of .* in whole pixels"),
        ("", "has no prompt"),
    ],
)
def test_wrong_lines_of_prompts(tmp_path, line, sentence):
    with pytest.raises(RecipeError, match=sentence):
        prompt_lines(str(written(tmp_path, [line], "p.jsonl")))


def test_prompts_that_a_reward_cannot_judge(folder, tmp_path):
    """A prompts file of another benchmark: nothing in it says which text to read."""
    path = written(tmp_path, ['{"tag": "counting", "prompt": "a photo of two cats"}'], "geneval.jsonl")
    recipe = prompts_recipe(folder, path, rewards=[{"kind": "text"}])
    with pytest.raises(RecipeError, match="needs prompts that quote a text.*there is the prompt 'a photo of two cats'"):
        make_task(one_stage(recipe), tmp_path / "run")


def test_pairs_of_edits(folder, tmp_path, pairs):
    """Both are edits of one picture, which stands behind them."""
    line = {"prompt": "make it red", "chosen": "good0.png", "rejected": "bad0.png", "references": ["bad1.png"]}
    path = written(tmp_path, [line, line])
    recipe = recipe_of(folder, "dpo", path, steps=2, data__tasks={"ti2i": 1})
    chosen, rejected = PairBatches(recipe, 64).pair(0, 0)
    assert len(chosen.images) == len(rejected.images) == 2 and (chosen.images[1] == rejected.images[1]).all()
    start_post(recipe, tmp_path / "run").run()
    assert log_of(tmp_path / "run")[0] == torch.tensor(2.0).log().item()


def test_what_is_not_named(folder, tmp_path):
    for path, sentence in (("", "nothing to draw is named"), (tmp_path / "none.txt", "there is no file .*none.txt")):
        with pytest.raises(RecipeError, match=sentence):
            check_data(one_stage(prompts_recipe(folder, path)))
    with pytest.raises(RecipeError, match="log.prompts must be given for sample pictures"):
        prompts_recipe(folder, "p.txt", log__sample_every=2)
    with pytest.raises(RecipeError, match="log.validate_every must be 0 without data.source"):
        prompts_recipe(folder, "p.txt", log__validate_every=2)
    with pytest.raises(RecipeError, match="rollout must be left out where pairs are given"):
        recipe_of(folder, "dpo", "p.jsonl", rollout={"count": 3})
