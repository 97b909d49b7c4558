from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from harness import INSTRUCTION_SETS

from qwen_image_fast import _C

DEVICES = ["cpu", "cuda-emulated", "cuda"]


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty comes back filled with NaN, so that an element that a kernel never wrote fails the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulated_device(pytestconfig):
    from emulator import build
    from emulator.device import EmulatedDevice

    if build.compiler() is None:
        pytest.skip("the CUDA emulator is compiled with g++ or clang++, and neither is here")
    return EmulatedDevice(pytestconfig.cache.mkdir("emulator"))


@contextmanager
def on_device(name: str, request) -> Iterator[str]:
    """Where ops run. On `cuda` all tensors that the test makes are CUDA tensors."""
    if name == "cpu":
        yield name
    elif name == "cuda-emulated":
        with request.getfixturevalue("emulated_device"):
            yield name
    elif not (torch.cuda.is_available() and _C.build_info()["cuda_architectures"]):
        pytest.skip("needs a GPU and a build with CUDA")
    else:
        convolutions = torch.backends.cudnn
        before, convolutions.allow_tf32 = convolutions.allow_tf32, False
        with torch.device("cuda"):
            yield name
        convolutions.allow_tf32 = before


@pytest.fixture(params=DEVICES)
def device(request):
    with on_device(request.param, request) as name:
        yield name


@pytest.fixture(params=DEVICES[1:])
def cuda(request):
    """Where CUDA kernels run: the device's name, and a function that enters it, for tests that compare with a CPU."""
    return request.param, lambda: on_device(request.param, request)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Every set of CPU kernels that this machine can run."""
    with in_instruction_set(request.param) as name:
        yield name


@pytest.fixture(params=[*INSTRUCTION_SETS, *DEVICES[1:]])
def kernels(request):
    """Every set of CPU kernels that this machine can run, and the CUDA kernels."""
    chosen = (
        in_instruction_set(request.param) if request.param in INSTRUCTION_SETS else on_device(request.param, request)
    )
    with chosen as name:
        yield name


@contextmanager
def in_instruction_set(name: str) -> Iterator[str]:
    best = _C.build_info()["cpu_in_use"]
    _C.set_isa(name)
    yield name
    _C.set_isa(best)
