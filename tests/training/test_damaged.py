"""One damaged file among many: left out everywhere, said once, and nothing else changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_pictures import noise
from trainer_helpers import log_of, small_recipe, start, weights

from qwen_image_fast.training.batches.batches import FlowBatches
from qwen_image_fast.training.batches.latents import LatentCache
from qwen_image_fast.training.data.screen import Rejected
from qwen_image_fast.training.engine.run_log import MOST_SAID, LeftOut
from qwen_image_fast.training.engine.trainer import Trainer
from qwen_image_fast.training.evaluation.cases import held_out_cases
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.run import cache_latents, train
from qwen_image_fast.training.sources.examples import Examples
from qwen_image_fast.training.sources.folder import Folder
from qwen_image_fast.training.sources.make import make_source
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.sources.synthesis import Synthesis
from qwen_image_fast.training.synthesis import SynthesisRecipe
from qwen_image_fast.training.tasks.flow import FlowTask
from qwen_image_fast.training.tasks.vae import VaeTask

DAMAGED = {"cut.png": "cannot be decoded", "empty.png": "the file is empty", "words.png": "its caption is not UTF-8"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven pictures, three of which cannot be used."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        (folder / f"{i}.png").write_bytes(noise(i))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    for name, content in {"cut.png": noise(5)[:300], "empty.png": b"", "words.png": noise(6)}.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_bytes(b"\xff\xfe\0" if name == "words.png" else b"a caption")
    return folder


class Whole(Examples):
    """Squares in the place of what cannot be used."""

    def sample(self, seed, index):
        try:
            return super().sample(seed, index)
        except Rejected:
            return Squares(32).sample(seed, index)


def source_of(pictures, kind=Examples):
    return kind(str(pictures), Folder(pictures))


def on(folder, pictures, **changes):
    data = {"data__source": str(pictures), "data__options": {}, "data__hold_out": 0.15}
    return small_recipe(folder, **{"data__text_dropout": 0.0, **data, **changes})


def seen(batches):
    return [
        (raw.index, raw.caption, raw.sigma, raw.images[0].sum(), raw.noise[0, 0].item()) for b in batches for raw in b
    ]


def test_samples_are_the_same_in_any_batch_on_any_rank(folder, pictures):
    """Eight samples of a step as one micro-batch, as four, and shared by four ranks; three epochs."""
    source = source_of(pictures)
    whole = FlowBatches(on(folder, pictures, batch=8), source, 64)
    split = FlowBatches(on(folder, pictures, batch=2, accumulate=4), source, 64)
    ranks = [FlowBatches(on(folder, pictures, batch=8), source, 64, share=(rank, 4)) for rank in range(4)]
    origins = set()
    for step in range(3):
        expected = whole.batch(step, 0)
        parts = [[split.batch(step, micro) for micro in range(4)], [rank.batch(step, 0) for rank in ranks]]
        assert len(expected) == 8
        for part in parts:
            assert seen(part) == seen([expected])
            assert [why for batch in part for why in batch.rejected] == expected.rejected
        origins |= {(origin.rpartition("/")[2], reason) for _, origin, reason in expected.rejected}
    assert {name for name, _ in origins} == DAMAGED.keys()
    assert all(DAMAGED[name] in reason for name, reason in origins)


def test_all_other_samples_stay_as_they_are(folder, pictures):
    """Those that can be used are the ones of a run whose files are all whole, at their places."""
    got, wanted = (FlowBatches(on(folder, pictures, batch=32), source_of(pictures, kind), 64).batch(0, 0)
                   for kind in (Examples, Whole))  # fmt: skip
    replaced = {index for index, _, _ in got.rejected}
    assert 0 < len(replaced) < 20
    pairs = [(a, b) for a, b in zip(got, wanted) if a.index not in replaced]
    assert all(a.caption == b.caption and np.array_equal(a.images[0], b.images[0]) for a, b in pairs)
    assert all(torch.equal(a.noise, b.noise) and a.sigma == b.sigma for a, b in zip(got, wanted))


@pytest.fixture(scope="module")
def whole(folder, pictures, tmp_path_factory):
    return run(folder, pictures, tmp_path_factory.mktemp("whole"))


def run(folder, pictures, out, resume=False, until=None, **changes):
    """Four epochs with validation, on which a run may be stopped before its end."""
    recipe = on(folder, pictures, steps=7, log__validate_every=2, checkpoint__every=1, **changes)
    trainer = start(recipe, out, resume=resume)
    if until is not None:
        step = trainer.train_step
        trainer.train_step = lambda batches: step(batches) if trainer.step < until else 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.run()
    else:
        trainer.run()
    return trainer


def rejected(out):
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_a_run_goes_on_and_says_each_file_once(folder, pictures, tmp_path, capsys):
    run(folder, pictures, tmp_path, until=5)
    run(folder, pictures, tmp_path, resume=True)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert sorted(line.partition(" (")[0].rpartition("/")[2] for line in said) == sorted(DAMAGED)
    lines = rejected(tmp_path)
    trained = [line for line in lines if line["sample"] is not None]
    assert sum(log_of(tmp_path, "rejected")) == len(trained) > 7  # in every epoch
    assert not [line for line in lines if line["sample"] is None]  # none that is damaged is held out
    assert len(log_of(tmp_path, "validation_loss")) == 4


@pytest.mark.parametrize("backend", ["here", "processes"])
def test_a_run_is_the_same_stopped_or_made_elsewhere_bit_by_bit(folder, pictures, tmp_path, whole, backend):
    if backend == "here":
        run(folder, pictures, tmp_path, until=3)
    again = run(folder, pictures, tmp_path, resume=True, producers__backend=backend, producers__count=2)
    assert log_of(tmp_path) == log_of(whole.folder) and rejected(tmp_path) == rejected(whole.folder)
    assert all(torch.equal(w, weights(again)[name]) for name, w in weights(whole).items())


def test_what_was_said_before_the_run_is_not_said_again(folder, pictures, tmp_path, capsys):
    changes = [f"data.source={pictures}", "data.buckets=[[32, 32]]", f"model.folder={folder}", "device=cpu"]
    changes += ["steps=1", "batch=32", "log.sample_every=0", "log.validate_every=0", "model.train_text_encoder=false"]
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: flow")
    train(path, [*changes, "lora.rank=2"], tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    assert sorted(line.partition("left out: ")[0] for line in said) == [f"{pictures / n} will be " for n in DAMAGED]
    assert {Path(line["origin"]).name for line in rejected(tmp_path / "run")} == set(DAMAGED)


def test_cached_latents_are_those_of_training(folder, pictures, tmp_path, capsys):
    changes = [f"data.source={pictures}", "data.buckets=[[32, 32]]", f"model.folder={folder}", "device=cpu"]
    changes += [
        "data.text_dropout=0",
        "data.hold_out=0.15",
        "producers.backend=processes",
        "data.tasks={t2i: 1.0, recon: 1.0}",
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: flow")
    cache_latents(path, changes, tmp_path / "cache", 14)
    recipe = on(folder, pictures)
    maker = FlowBatches(recipe, make_source(recipe.data), 64)
    cache, expected = LatentCache(tmp_path / "cache"), [maker.content(0, i) for i in range(14)]
    assert [cache.read(i).text for i in range(14)] == [made.caption for made in expected]
    assert all(np.array_equal(cache.read(i).pixels[0], expected[i].images[0]) for i in range(14))
    why = [pair for made in expected for pair in made.rejected]
    lines = [json.loads(x) for x in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["origin"], line["reason"]) for line in lines] == why and len(why) >= 6
    said = capsys.readouterr().err
    assert all(said.count(f"{pictures / name} ") == 1 for name in DAMAGED)  # some at the first look
    assert f"{len(why)} samples were left out for 14 used" in said and cache.meta["held_out"] == 16


@pytest.mark.parametrize("file", ["tokens.raw", "index.jsonl"])
def test_a_damaged_cache_is_a_sentence(folder, tmp_path, file):
    path = tmp_path / "recipe.yaml"
    path.write_text("kind: flow")
    changes = [
        "data.source=squares",
        "data.options={size: 32}",
        "data.buckets=[[32, 32]]",
        f"model.folder={folder}",
        "device=cpu",
    ]
    cache_latents(path, changes, tmp_path / "cache", 4)
    content = (tmp_path / "cache" / file).read_bytes()
    (tmp_path / "cache" / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"data.cache: .*cache is damaged \(.*\); write it again"):
        LatentCache(tmp_path / "cache")


def test_a_vae_learns_from_the_others(pictures, tmp_path):
    recipe = on(
        "", pictures, kind="vae", model=None, base_dim=4, statistics=8, batch=4, steps=4, crop=16,
        log__validate_every=2, log__sample_every=4,
    )  # fmt: skip
    task = VaeTask(recipe)
    trainer = Trainer(recipe, task, tmp_path)
    trainer.run()
    assert all(len(task.maker.batch(step, 0).images) == 4 for step in range(4))
    assert {line["origin"].rpartition("/")[2] for line in rejected(tmp_path)} == DAMAGED.keys()
    trained = [line for line in rejected(tmp_path) if line["sample"] is not None]
    assert sum(log_of(tmp_path, "rejected")) == len(trained) > 3


class Torn(Squares):
    """Every third edit cannot be read."""

    def edit(self, seed, index):
        if index % 3 == 0:
            raise Rejected(f"pair {index}", "broken_file: its source is empty")
        return super().edit(seed, index)


def test_edits_and_grids_do_without_torn_pairs(folder, tmp_path):
    recipe = small_recipe(
        folder, steps=2, data__tasks={"ti2i": 1.0}, log__sample_every=1, log__validate_every=1,
        log__prompts=["red square"] * 2,
    )  # fmt: skip
    trainer = start(recipe, tmp_path, Torn(32))
    batch = trainer.task.maker.batch(0, 0)
    assert [len(raw.images) for raw in batch] == [2] * 4 and {index for index, _, _ in batch.rejected} == {0, 3}
    trainer.run()
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3 * (2 + 2)  # pictures and edits, before and after steps
    assert {"pair 0", "pair 3"} <= {line["origin"] for line in rejected(tmp_path)}


def test_drawn_samples_do_without_damaged_photographs(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(noise(1, 200, 300))
        (tmp_path / f"{name}.txt").write_text("a wall")
    (tmp_path / "b.png").write_bytes(noise(1, 200, 300)[:900])
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    options = {"photos": str(tmp_path), "compositional": 1.0, "pure": 0.0, "complex": 0.0, "natural": 0.0}
    source = Synthesis(**options)
    reasons = {}
    for index in range(40):
        try:
            assert source.sample(0, index).caption.endswith("in front of a wall")
        except Rejected as error:
            reasons[error.origin.rpartition("/")[2]] = error.reason
    assert reasons.keys() == {"b.png", "c.png"}
    assert "cannot be decoded" in reasons["b.png"] and "its text file is empty or not UTF-8" in reasons["c.png"]
    assert len(held_out_cases(SynthesisRecipe.from_dict(options), 12)) == 12


def test_data_of_which_nothing_can_be_used_ends_the_run_with_a_sentence(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a caption")
    with pytest.raises(
        RecipeError, match="has no picture that can be used: .*a.png: it is no picture that can be read"
    ):
        FlowTask(on(folder, tmp_path), tmp_path / "run")
    (tmp_path / "a.png").write_bytes(noise(0))  # looked at, and rejected by a filter in its turn
    filters = {"stages": [1], "without": ["nsfw"], "curation": {"min_side": 4096}}
    task = FlowTask(on(folder, tmp_path, data__filters=filters), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"1000 samples in a row were rejected, .*a.png \(resolution: "):
        task.maker.batch(0, 0)
    tight = Synthesis(
        sizes=[[64, 64]], paragraph=1.0, paragraphs=["too long a text " * 40], complex=0.0, compositional=0.0
    )
    task = FlowTask(small_recipe(folder), tmp_path / "other", tight)
    with pytest.raises(RecipeError, match="the first of them sample 0 of the synthesis"):
        task.maker.batch(0, 0)


def test_a_thousand_damaged_files_do_not_fill_the_terminal():
    left_out = LeftOut()
    said = [left_out.sentence(f"{i}.png", "broken_file: the file is empty") for _ in range(2) for i in range(1000)]
    assert [s for s in said if s][MOST_SAID - 1 :] == [
        "left out: 49.png (broken_file: the file is empty)",
        "more files are left out (broken_file): rejected.jsonl lists them",
    ]
    assert left_out.sentence("1.png", "resolution: it is small") is None
    assert left_out.sentence("x.png", "resolution: it is small")
