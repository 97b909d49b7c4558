"""The second model of the package: its size, and that it answers tasks of vision on scenes that it never saw."""

import numpy as np
import pytest
import torch

from qwen_image_fast import QwenImageEditPlusPipeline
from qwen_image_fast.folders import PACKAGED
from qwen_image_fast.training.evaluation.evaluate_edit import edited_by
from qwen_image_fast.training.evaluation.evaluate_vision import evaluate, held_out_tasks, summary
from qwen_image_fast.training.evaluation.tiny_models import through
from qwen_image_fast.training.ship import LARGEST

FOLDER = PACKAGED["tiny-vision"]


@pytest.fixture(scope="module")
def editor():
    return QwenImageEditPlusPipeline.from_pretrained("tiny-vision", torch_dtype=torch.float32)


def test_it_is_small_and_holds_no_code():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= LARGEST
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_its_answers_are_better_than_those_that_need_no_model(editor):
    tasks = [one for kind in ("depth", "segment", "view") for one in held_out_tasks(kind, 4, seed=1)]
    edit = edited_by(editor, seed=0, num_inference_steps=8, true_cfg_scale=1.0)
    found = summary(list(evaluate(edit, tasks, lambda pictures: through(editor.vae, pictures), batch=8)))
    depth, segment, view = found["depth"], found["segment"], found["view"]
    assert depth["model"]["AbsRel"] < 0.8 * depth["trivial"]["AbsRel"]
    assert segment["model"]["IoU"] > 0.7 > 0.2 > segment["trivial"]["IoU"]
    assert view["model"]["PSNR"] > view["trivial"]["PSNR"] + 1.5
    assert depth["right, through its VAE"]["AbsRel"] < 0.02
    assert segment["right, through its VAE"]["IoU"] > 0.98


def test_its_vae_draws_its_mean(editor):
    distribution = editor.vae.encode(torch.rand(1, 3, 1, 64, 64) * 2 - 1).latent_dist
    assert (distribution.logvar == -20).all() and np.isfinite(distribution.mean.numpy(force=True)).all()
