import importlib

import pytest
from reference import AREA

from qwen_image_fast.pipelines import conditions, edit_inpaint, editing, images, layered
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
    for name in ("edit", "edit_plus", "edit_inpaint", "layered"):
        module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
        full = module.calculate_dimensions
        patch.setattr(module, "calculate_dimensions", lambda area, ratio, full=full: full(area / 64, ratio))
    for module in (conditions, editing, edit_inpaint):
        patch.setattr(module, "VAE_AREA", AREA)
    patch.setattr(layered, "area_size", lambda area, w, h: images.area_size(area / 64, w, h))
    yield
    patch.undo()
