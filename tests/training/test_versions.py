"""What of torch only several processes need, is asked for there alone, and by name."""

import subprocess
import sys

import pytest
import torch
from torch.distributed import checkpoint, fsdp
from trainer_helpers import log_of, small_folder, small_recipe, start
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.engine.checkpoint import RECORD, load
from qwen_image_fast.training.parallel import layout
from qwen_image_fast.training.recipe.fields import RecipeError

OLD = """
import torch.distributed.checkpoint, torch.distributed.fsdp
for module in (torch.distributed.checkpoint, torch.distributed.fsdp):
    for name in ("HuggingFaceStorageReader", "HuggingFaceStorageWriter", "FSDPModule", "MixedPrecisionPolicy",
                 "fully_shard", "register_fsdp_forward_method"):
        vars(module).pop(name, None)
import qwen_image_fast.training.run
assert "qwen_image_fast.training.parallel.shard" not in sys.modules
assert "qwen_image_fast.training.parallel.checkpoints" not in sys.modules
"""


def test_one_process_needs_none_of_it():
    """torch 2.5 to 2.8: `import qwen_image_fast.training.run` was a missing extra, by its message."""
    run = subprocess.run([sys.executable, "-c", "import sys" + OLD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_run_imports_none_of_it(tmp_path, monkeypatch):
    for name in ("shard", "checkpoints"):
        monkeypatch.setitem(sys.modules, f"qwen_image_fast.training.parallel.{name}", None)  # importing it fails
    recipe = small_recipe(small_folder(tmp_path / "pipe"), steps=1, log__validate_every=0, log__sample_every=0)
    start(recipe, tmp_path / "run").run()
    assert len(log_of(tmp_path / "run")) == 1
    start(recipe, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("module", "name"), [(checkpoint, "HuggingFaceStorageWriter"), (fsdp, "FSDPModule")], ids=["2.8", "2.5"]
)
def test_several_need_a_newer_torch(module, name, monkeypatch, tmp_path):
    layout.check_torch()
    monkeypatch.delattr(module, name)
    text = f"^parallel: several processes, .*, need torch 2.9 or newer, this is {torch.__version__}; one process trains"
    with pytest.raises(RecipeError, match=text.replace("+", r"\+")):
        layout.check_torch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["train", "tiny/1-shapes", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "need torch 2.9 or newer" in result.stderr
    parts = tmp_path / "step-00000001"
    parts.mkdir()
    (parts / RECORD).write_text("{}")
    (parts / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="need torch 2.9"):
        load(parts)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ModuleNotFoundError("No module named 'yaml'", name="yaml"),
            "error: training needs the package yaml: pip install '.[train]'",
        ),
        (ImportError("cannot import name 'a' from 'b'", name="b"), "'b'; `qwen-image-fast doctor` names the versions"),
        (ModuleNotFoundError("No module named 'torch.b'", name="torch.b"), "'; `qwen-image-fast doctor` names the"),
        (ImportError("reading parquet needs pyarrow"), "error: reading parquet needs pyarrow\n"),
    ],
)
def test_what_is_missing_is_told_from_what_is_old(error, text, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("qwen_image_fast.training.run.train", fails)
    result = CliRunner().invoke(app, ["train", "tiny/1-shapes"])
    assert result.exit_code == 2 and text in result.stderr, result.stderr
