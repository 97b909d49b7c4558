import pytest
from reference import smaller_sizes

from qwen_image_fast.tiny import write_untrained


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory):
    """The tiny model in an editing pipeline's layout; tests that use it only read."""
    folder = tmp_path_factory.mktemp("edit") / "model"
    write_untrained(folder, edit=True)
    return folder


@pytest.fixture(scope="module")
def small():
    """diffusers' sizes, 64 times smaller, in both."""
    patch = pytest.MonkeyPatch()
    smaller_sizes(patch)
    yield
    patch.undo()
