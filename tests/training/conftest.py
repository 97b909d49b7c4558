"""The small pipeline of `trainer_helpers`, written once; tests that use it only read."""

import pytest
import torch
from trainer_helpers import small_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("small") / "pipeline")


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """These models are too small to share; idle threads would only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
