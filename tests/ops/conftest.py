import pytest
import torch
from harness import INSTRUCTION_SETS

from qwen_image_fast import _C


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty comes back filled with NaN, so that an element that a kernel never wrote fails the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Every set of CPU kernels that this machine can run."""
    best = _C.build_info()["cpu_in_use"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(best)
