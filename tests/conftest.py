"""Shared fixtures: the tiny Qwen-Image with random weights, written once per session."""

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A diffusers-layout folder by `write_untrained`; tests that use it only read."""
    pytest.importorskip("qwen_image_fast.models.transformer")
    from qwen_image_fast.tiny import write_untrained

    folder = tmp_path_factory.mktemp("tiny") / "qwen-image-tiny"
    write_untrained(folder)
    return folder
