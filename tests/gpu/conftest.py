import pytest
import torch


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """cuDNN's convolutions in float32 round their inputs to TF32 otherwise, 10 bits, as torch lets them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
