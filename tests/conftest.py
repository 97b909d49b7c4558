"""Shared fixtures: the tiny Qwen-Image with random weights, written once per session."""

import os
import signal

import pytest
import torch

from qwen_image_fast.tiny import write_untrained

# A shell starts what runs in the background with Ctrl-C ignored, which what is tested would leave so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two parallel test processes share two cores; their OpenMP pools would spin against each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def one_thread():
    """For small work on a machine that runs other tests: threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A diffusers-layout folder by `write_untrained`; tests that use it only read."""
    folder = tmp_path_factory.mktemp("tiny") / "qwen-image-tiny"
    write_untrained(folder)
    return folder
