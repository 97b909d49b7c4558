"""Models and data by every name that a user may give: `~`, "tiny", a pipeline's VAE."""

import json

import pytest
import torch
from data_pictures import noise
from trainer_helpers import small_recipe

from qwen_image_fast.folders import SHIPPED
from qwen_image_fast.training.batches.latents import LatentCache
from qwen_image_fast.training.data.annotate import captioner
from qwen_image_fast.training.data.recipe import AnnotateRecipe
from qwen_image_fast.training.engine.memory import check_recipe, transformer_config
from qwen_image_fast.training.run import cache_latents, train
from qwen_image_fast.training.tasks.flow import FlowTask
from qwen_image_fast.training.tasks.vae import VaeTask


@pytest.fixture
def home(tmp_path, monkeypatch, folder):
    """A home folder with a pipeline, a recipe and pictures."""
    (tmp_path / "pipeline").symlink_to(folder)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(noise(i))
        (tmp_path / "photos" / f"{i}.txt").write_text(f"picture {i}")
    recipe = {"steps": 1, "batch": 2, "device": "cpu", "model": {"folder": "~/pipeline", "vae": "~/pipeline"},
              "data": {"source": "~/photos", "buckets": [[32, 32]]}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    return tmp_path


def test_the_home_folder(home):
    producers = ["producers.backend=processes"]
    trainer = train("~/recipe.yaml", producers, "~/run")
    assert trainer.folder == home / "run" and (home / "run" / "model" / "vae" / "config.json").is_file()
    cache_latents("~/recipe.yaml", [], "~/cache", 3)
    assert len(LatentCache("~/cache")) == 3
    # The recipe of a checkpoint says the name, not what it stood for.
    train("~/recipe.yaml", ["steps=2", "data.cache=~/cache", "log.validation_samples=1"], "~/run", resume=True,
          allow_changes=True)  # fmt: skip
    changed = json.loads((home / "run" / "checkpoints" / "step-00000002" / "trainer.json").read_text())["recipe"]
    assert changed["model"]["folder"] == changed["model"]["vae"] == "~/pipeline"


def test_the_tiny_model(tmp_path):
    recipe = small_recipe("tiny", model__vae="tiny")
    assert transformer_config(recipe)["num_layers"] == 5
    assert check_recipe(recipe, torch.device("cpu"), torch.float32).weights > 0
    task = FlowTask(recipe, tmp_path)
    assert task.folder == SHIPPED and task.vae_folder == SHIPPED / "vae"
    changes = {"kind": "vae", "mode": "decoder", "folder": "tiny", "model": None}
    vae = VaeTask(small_recipe("", **changes)).vae
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), task.pipe.vae.parameters()))


def test_a_captioner_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "qwen-vl").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no Qwen2.5-VL in ~/qwen-vl: .* config.json"):
        captioner(AnnotateRecipe(model="~/qwen-vl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no Qwen2.5-VL in qwen-v: .* did you mean qwen-vl"):
        captioner(AnnotateRecipe(model="qwen-v"))
