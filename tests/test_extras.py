"""What the extras promise: their packages, and a sentence that names the extra where one is missing."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.extras.__main__ import FEATURES, RESULTS, failures
from typer.testing import CliRunner

import qwen_image_fast
from qwen_image_fast.cli import app
from qwen_image_fast.extras import EXTRAS, MissingPackage, needed_for

PACKAGE = Path(qwen_image_fast.__file__).parent
# Where a package is imported under another name than it is installed.
NAMES = {"pyyaml": "yaml", "fonttools": "fontTools", "opencv-python-headless": "cv2", "pillow": "PIL"}
NAMES |= {"faiss-cpu": "faiss"}
DEPENDENCIES = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL", "pydantic"}
DEPENDENCIES |= {"tqdm", "rich", "typer"}
# What comes with one of these, or has a sentence of its own.
MORE = {"annotated_types": "pydantic", "h11": "uvicorn", "scipy": "schedulers.py"}


def imported(path):
    """(package, whether inside `needed_for`, module of the import) for all imports of other packages in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "needed_for" in ast.unparse(node.items[0].context_expr)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "qwen_image_fast":
                yield top, id(node) in guarded


def test_every_package_is_a_dependency_or_in_an_extra():
    brought = {package for packages in EXTRAS.values() for package in packages}
    # In a checkout training/ is a link, which rglob passes by.
    for path in sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "training").resolve().rglob("*.py")}):
        found = list(imported(path))
        safe = {top for top, guarded in found if guarded}
        for top, _ in found:
            assert top in DEPENDENCIES or top in brought or top in MORE, f"{path} imports {top}"
            # diffusers is asked for once, by `accelerate`, and by whoever hands in its objects; what serves by cli/.
            if top in brought and not {"drop_in", "serving"} & {*path.parts} and path.name != "mixture.py":
                assert top in safe, f"{path} imports {top} outside of needed_for"


def test_the_table_is_that_of_pyproject():
    tomllib = pytest.importorskip("tomllib")
    file = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]

    def names(requirements):
        found = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
        return {NAMES.get(name, name.replace("-", "_")) for name in found}

    assert names(project["dependencies"]) == DEPENDENCIES
    extras = {extra: names(found) for extra, found in project["optional-dependencies"].items() if extra != "dev"}
    assert extras == {extra: set(packages) for extra, packages in EXTRAS.items()}


def test_the_sentence():
    with (
        pytest.raises(MissingPackage, match="^reading needs the package fontTools: pip install '.\\[train\\]' or pip "),
        needed_for("reading"),
    ):
        raise ModuleNotFoundError("No module named 'fontTools.ttLib'", name="fontTools.ttLib")
    with (
        pytest.raises(MissingPackage, match="^the inner one needs"),
        needed_for("the outer"),
        needed_for("the inner one"),
    ):
        raise ModuleNotFoundError(name="yaml")
    with pytest.raises(ImportError, match="cannot import name 'FSDPModule'"), needed_for("training"):
        raise ImportError("cannot import name 'FSDPModule' from 'torch.distributed.fsdp'", name="torch")


@pytest.mark.parametrize(
    ("package", "args", "sentence"),
    [
        ("yaml", "train tiny/1-shapes", "reading a recipe needs the package yaml: pip install '.[train]'"),
        ("rapidocr", "evaluate text --count 1", "reading text needs the package rapidocr: pip install '.[evaluate]'"),
        ("onnxruntime", "evaluate edit --count 1", "reading text needs the package onnxruntime: pip install '.[eval"),
    ],
)
def test_a_missing_package(package, args, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, [*args.split(), *(["--out", "out"])])
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2 and [e.startswith(f"error: {sentence}") for e in errors] == [True], result.output
    assert result.stderr.splitlines()[-1] == errors[0] and not (tmp_path / "out").exists()


def test_all_that_is_missing_of_an_extra_is_named_at_once(monkeypatch):
    for package in ("prometheus_client", "python_multipart", "starlette", "uvicorn", "yaml", "pyarrow", "cv2"):
        monkeypatch.setitem(sys.modules, package, None)
    start = "error: qwen-image-fast serve needs the package python_multipart: pip install '.[serve]' in a checkout of "
    result = CliRunner().invoke(app, ["serve", "--model", "tiny"])
    said = "qwen-image-fast brings it; missing too, of serve: prometheus_client, starlette, uvicorn"
    assert result.exit_code == 2 and result.stderr.splitlines() == [start + said], result.output
    with pytest.raises(MissingPackage) as caught, needed_for("reading", "write"):
        import yaml  # noqa: F401
    assert str(caught.value).endswith("brings it, or write; missing too, of train: pyarrow; of data: cv2, pyarrow")


def test_serving_says_that_it_begins_before_what_takes_long_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwen_image_fast.serving.run", None)
    result = CliRunner().invoke(app, ["serve", "--model", "tiny"])
    first, second = result.stderr.splitlines()[:2]
    assert first == "tiny: loading the server" and "qwen_image_fast.serving.run" in second, result.stderr


def test_the_results_are_of_every_extra_and_good():
    """What `make extras` left; an extra that came later was not tried then."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["extras"]
    tried = [extra for extra in FEATURES if (extra or "no extra") in found]
    assert {"", "train", "diffusers"} <= {*tried} and len(found) == len(tried) and failures(found) == []
    assert {extra.split(",")[-1] for extra in FEATURES} == {"", *EXTRAS}
    for extra in tried:
        assert len(found[extra or "no extra"]) == 1 + len(FEATURES[extra])
    assert failures({"data": {"installation seconds": 3, "report": "exit code 1: no"}}) == [
        "data: report: exit code 1: no"
    ]


def test_pyarrow_missing_where_a_module_begins(tmp_path):
    code = "import sys; sys.modules['pyarrow'] = None; from qwen_image_fast.__main__ import main; main()"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "data", "report", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: filtering a data set needs the package pyarrow: pip install '.[train]' or")
