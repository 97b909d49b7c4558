import pytest
from serving_harness import MODELS, lora_file


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return MODELS(lora_file(tmp_path_factory.mktemp("lora") / "style.safetensors"))


@pytest.fixture(scope="module")
def running(models):
    from http_harness import Running

    server = Running(models)
    yield server
    server.end()
