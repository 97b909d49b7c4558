"""Latents and condition states on disk: read back bit for bit, and made anew when anything they depend on changes."""

import pytest
import torch
from source_helpers import files, write_pairs
from trainer_helpers import log_of, small_recipe, start, weights

from qwen_image_fast.training.producer import encode
from qwen_image_fast.training.producer.encoded import fingerprint


def recipe_of(folder, root, store, **changes):
    common = {
        "data__options": {},
        "data__encoded": str(store),
        "model__train_text_encoder": False,
        "data__hold_out": 0.0,
    }
    return small_recipe(folder, data__source=str(root), **{**common, **changes})


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("backend", ["here", "processes"])
def test_a_second_run_encodes_nothing_and_learns_the_same(folder, tmp_path, monkeypatch, edits, backend):
    root, tasks = write_pairs(tmp_path / "p", "folders"), {"ti2i": 1.0} if edits else {"recon": 1.0}
    recipe = recipe_of(folder, root, tmp_path / "store", data__tasks=tasks, producers__backend=backend)
    first = start(recipe, tmp_path / "one")
    first.run()
    plain = start(recipe_of(folder, root, "", data__tasks=tasks), tmp_path / "plain")
    plain.run()
    assert torch.allclose(torch.tensor(log_of(tmp_path / "one")), torch.tensor(log_of(tmp_path / "plain")), rtol=1e-4)
    count = len(list((tmp_path / "store").rglob("*.safetensors")))
    assert count > 3
    if backend == "here":
        monkeypatch.setattr(encode, "encode_images", None)
        monkeypatch.setattr(encode.Encoders, "_texts", None)
    second = start(recipe, tmp_path / "two")
    second.run()
    assert log_of(tmp_path / "one") == log_of(tmp_path / "two")
    assert all(torch.equal(w, weights(second)[name]) for name, w in weights(first).items())
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == count


def test_what_changes_is_made_anew(folder, tmp_path):
    root = files(tmp_path / "f", {"a.png": 0, "a.txt": "red"})

    def kept(**changes):
        task = start(
            recipe_of(folder, root, tmp_path / "store", data__text_dropout=0.0, **changes), tmp_path / "r"
        ).task
        batch = task.maker.batch(0, 0)
        task.to_latents(batch), task.texts(batch)
        return len(list((tmp_path / "store").rglob("*.safetensors")))

    assert kept() == 2 and kept() == 2
    files(root, {"a.txt": "crimson"})
    assert kept() == 3
    files(root, {"a.png": 1})
    assert kept() == 4
    assert kept(data__buckets=[[16, 16]]) == 5
    assert kept(data__buckets=[[16, 16]], model__max_text_tokens=3) == 6
    for path in (tmp_path / "store").rglob("*.safetensors"):
        path.write_bytes(b"x")
    kept()
    assert sum(path.stat().st_size > 1 for path in (tmp_path / "store").rglob("*.safetensors")) == 2


def test_the_fingerprint_of_a_model(tmp_path):
    files(tmp_path / "a", {"config.json": "{}", "w.safetensors": bytes(5 * 2**20)})
    before = fingerprint(tmp_path / "a")
    files(tmp_path / "b", {"config.json": "{}", "w.safetensors": bytes(5 * 2**20 - 1) + b"1"})
    files(tmp_path / "c", {"config.json": "{ }", "w.safetensors": bytes(5 * 2**20)})
    files(tmp_path / "d", {"config.json": "{}", "w.safetensors": bytes(5 * 2**20)})
    assert fingerprint(tmp_path / "d") == before
    assert len({before, fingerprint(tmp_path / "b"), fingerprint(tmp_path / "c")}) == 3
