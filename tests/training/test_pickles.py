"""Models of transformers that judge, caption and embed are read from safetensors alone."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from qwen_image_fast.models.text_encoder import load_captioner
from qwen_image_fast.training.data.filters.captions import ClipScorer
from qwen_image_fast.training.evaluation.bench import judges


@pytest.fixture
def pickled(tiny_folder, tmp_path):
    """A vision-language model whose weights are a pickle."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder / "text_encoder", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_captioners(pickled):
    with pytest.raises(OSError, match="safetensors"):
        load_captioner(pickled)


def test_judges(pickled):
    with pytest.raises(ValueError, match="--judge must have its weights as safetensors"):
        judges.find_judge(str(pickled), "", ("chat",))
    with pytest.raises(OSError, match="no vision-language model.*safetensors"):
        judges._read_model(pickled, None)


def test_scores_of_captions(pickled):
    with pytest.raises(FileNotFoundError, match="there is no model") as caught:
        ClipScorer(str(pickled))
    assert "safetensors" in str(caught.value.__cause__)
