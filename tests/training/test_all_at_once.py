"""A run with everything that draws lots, stopped in the middle: it goes on bit by bit, whoever makes its batches."""

import json

import pytest
import torch
from data_pictures import noise
from source_helpers import files, write_pairs
from trainer_helpers import log_of, small_recipe, start, weights


@pytest.fixture(scope="module")
def everything(folder, tmp_path_factory):
    """Own pictures with tags, copies of the class that count half, and edits with reconstructions; half-trained."""
    root = tmp_path_factory.mktemp("everything")
    names = {}
    for i in range(10):
        captions = [{"text": f"one, two, three, {i}", "weight": 2}, {"text": f"other, words, {i}"}]
        names |= {f"mine/{i}.png": noise(i), f"mine/{i}.json": json.dumps({"captions": captions})}
        names |= {f"class/{'often' if i % 2 else 'seldom'}/{i}.png": noise(50 + i)}
    files(root, names)
    mixture = [
        {"name": "mine", "source": str(root / "mine"), "weight": 2.0,
         "captions": {"trigger": "sks", "shuffle": True, "drop": 0.3, "keep": 1}},
        {"name": "class", "source": str(root / "class"), "repeats": {"often": 3}, "loss_weight": 0.5,
         "captions": {"default": "noise"}},
        {"name": "edits", "source": str(write_pairs(root / "pairs", "folders")), "tasks": {"ti2i": 0.7, "recon": 0.3}},
    ]  # fmt: skip
    return {
        "steps": 6, "checkpoint__every": 3, "accumulate": 2, "data__mixture": mixture, "data__hold_out": 0.2,
        "data__encoded": str(root / "store"), "model__train_text_encoder": False, "log__validate_every": 3,
        "lora__rank": 4, "lora__kind": "dora", "lora__dropout": 0.3, "lora__targets": ["all"],
        "lora__ranks": {"mlp": 2}, "optimizer__name": "adafactor", "optimizer__schedule": "cosine-restarts",
        "optimizer__cycles": 2, "sigma__name": "resolution", "sigma__weighting": "min-snr",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder, everything, tmp_path_factory):
    trainer = start(small_recipe(folder, **everything), tmp_path_factory.mktemp("whole"))
    trainer.run()
    return trainer


@pytest.mark.parametrize("backend", ["here", "processes"])
def test_it_goes_on(folder, everything, whole, tmp_path, backend):
    changes = {**everything, "producers__backend": backend}
    stopped = start(small_recipe(folder, **changes), tmp_path)
    step = stopped.train_step
    stopped.train_step = lambda batches: step(batches) if stopped.step < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        stopped.run()
    resumed = start(small_recipe(folder, **changes), tmp_path, resume=True)
    assert resumed.step == 3
    resumed.run()
    assert all(torch.equal(w, weights(resumed)[name]) for name, w in weights(whole).items())
    assert all(torch.equal(average, resumed.ema.average[name]) for name, average in whole.ema.average.items())
    for key in ("loss", "validation_loss"):
        assert log_of(whole.folder, key) == log_of(tmp_path, key)


def test_each_of_it_is_there(folder, everything, whole):
    seen = [raw for step in range(20) for micro in (0, 1) for raw in whole.task.maker.batch(step, micro)]
    assert {raw.task for raw in seen} == {"t2i", "ti2i", "recon"}
    mine = {raw.caption for raw in seen if raw.caption.startswith("sks, ")}
    assert len(mine) > 20 and any(caption.count(",") < 3 for caption in mine)
    of_class = [raw for raw in seen if raw.caption == "noise"]
    assert len(of_class) > 20
    assert len({raw.weight for raw in seen}) > 20  # by their noise levels
    validated = {raw.images[0].tobytes() for raw in whole.task.batches.validation()}
    assert not validated & {raw.images[0].tobytes() for raw in seen}
