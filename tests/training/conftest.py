"""What tests only read, written once: the small pipeline of `trainer_helpers`, and a photograph."""

import numpy as np
import pytest
from PIL import Image
from trainer_helpers import small_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("small") / "pipeline")


@pytest.fixture(autouse=True)
def small_work(one_thread):
    pass


@pytest.fixture(scope="session")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs") / "noise.png"
    coarse = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((320, 192), Image.Resampling.BICUBIC).save(path)
    return str(path), "coloured clouds", "彩云"


@pytest.fixture
def one_photograph(monkeypatch, photograph):
    """It stands for those in scikit-image's wheel."""
    from qwen_image_fast.training.synthesis import compositional, photos

    find = photos.find_photos
    monkeypatch.setattr(compositional, "find_photos", lambda folder: find(folder) if folder else (photograph,))
