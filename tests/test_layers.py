"""Imports go one way, from the ops up to the command line; ops never import each other."""

import ast
from pathlib import Path

import pytest

import qwen_image_fast

ROOT = Path(qwen_image_fast.__file__).parent
# From the bottom up; a module may import its own layer and those below it.
LAYERS = [
    {"_C", "ops"},
    {"folders", "tensor_files", "checkpoint", "models"},
    {"chat", "schedulers"},
    {"graphs", "sampling"},
    {"pipelines"},
    {"tiny", "drop_in", "accelerate", "inspect_model", "png_metadata", "doctor", "doctor_cases"},
    {"training"},
    {"cli"},
]
# What ops share; the rest of ops/ is one op a file.
SHARED = ("_library", "_linear", "fp8_rows")
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path) -> list[str]:
    """The package's own modules that a file imports, as dotted names below the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            package = ["qwen_image_fast", *path.relative_to(ROOT).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names]
    return [m.removeprefix("qwen_image_fast.") for m in found if m.startswith("qwen_image_fast.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).with_suffix("").parts
    if own == ("training", "__main__"):
        own = ("cli", "__main__")  # a way to start the command, which torchrun needs
    for module in imports(path):
        top, *rest = module.split(".")
        if top in ("__version__", *qwen_image_fast.__all__) and own[0] in ("cli", "doctor", "doctor_cases", "training"):
            continue
        assert layer(top) <= layer(own[0]), f"{'.'.join(own)} imports {module}"
        if own[0] == "ops" and top == "ops":
            assert rest[0] in SHARED or own[1] == "__init__", f"{'.'.join(own)} imports {module}"


def test_only_the_drop_in_knows_diffusers():
    for path in FILES:
        text = path.read_text()
        if "import diffusers" in text or "from diffusers" in text:
            assert path.relative_to(ROOT).parts[0] in ("accelerate.py", "drop_in", "doctor.py"), path
