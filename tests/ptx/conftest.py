import pytest
import torch
from compile_cuda.__main__ import find_nvcc

from ptx.device import InterpretedDevice


def interpreted(name: str, pytestconfig) -> InterpretedDevice:
    from ptx import build

    if find_nvcc()[0] is None:
        pytest.skip(f"PTX is compiled first: {find_nvcc()[1]}")
    return InterpretedDevice(*build.module(name, pytestconfig.cache.mkdir("ptx")))


@pytest.fixture(scope="session")
def session_kernels(pytestconfig):
    return interpreted("kernels", pytestconfig)


@pytest.fixture(scope="session")
def session_linear(pytestconfig):
    return interpreted("linear", pytestconfig)


@pytest.fixture
def kernels(session_kernels):
    """Our own kernels and conv2d, as compiled for sm_90a."""
    with session_kernels:
        yield session_kernels


@pytest.fixture
def linear(session_linear):
    """The linear layers of CUTLASS, as compiled for sm_90a and sm_80."""
    with session_linear:
        yield session_linear


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty comes back filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
