"""Imports go one way, from the ops up to the command line; ops never import each other."""

import ast
from pathlib import Path

import pytest

import qwen_image_fast

ROOT = Path(qwen_image_fast.__file__).parent
# From the bottom up; a module may import its own layer and those below it.
LAYERS = [
    {"_C", "ops", "extras"},
    {"folders", "files", "keywords", "once", "picture_memory", "pictures", "sizes", "tensor_files", "weights"},
    {"checkpoint", "models"},
    {"parallel"},
    {"chat", "schedulers", "model_defaults", "request", "request_base", "request_fields"},
    {"graphs", "sampling", "quantize", "quantize_modulation", "quantize_report"},
    {"pipelines"},
    {"tiny", "drop_in", "inspect_file", "inspect_model", "png_metadata", "output_files", "request_schedule"}
    | {"doctor", "doctor_cases", "doctor_libraries", "doctor_picture"},
    {"serving"},
    {"training"},
    {"cli", "__main__"},
]
# What may use the package by its public names.
ABOVE = ("cli", "doctor", "doctor_cases", "serving", "training")
# The rooms of training/, from the bottom up. A file may stand on another floor than its room.
TRAINING = [
    {"blas", "randomness", "terminal", "text_files", "worker_pool"},
    {"recipe"},
    {"synthesis"},
    {"evaluation"},
    {"data"},
    {"sources"},
    {"batches"},
    {"adapters", "lora", "trainable", "parallel", "velocity"},
    {"producer"},
    {"rewards"},
    {"rollout"},
    {"tasks"},
    {"engine", "parallel.checkpoints", "parallel.plan", "parallel.preset"},
    {"run", "ship", "export", "compare"},
    {"evaluation.cli", "data.cli"},
]
# What ops share; the rest of ops/ is one op a file.
SHARED = ("_attention_amx", "_choices", "_eight_bits", "_int4", "_int8", "_library", "_linear", "fp8_rows")
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def floor(name: str) -> int:
    """Of a module of the training wing, by the longest name that `TRAINING` has."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        start = ".".join(parts[:length])
        for number, rooms in enumerate(TRAINING):
            if start in rooms:
                return number
    raise AssertionError(f"training/{name} stands in no room of this test")


def at_run_time(tree: ast.Module) -> list[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def imports(path: Path) -> list[str]:
    """The package's own modules that a file imports, as dotted names below the package."""
    found = []
    for node in at_run_time(ast.parse(path.read_text())):
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
        if top in ("__version__", *qwen_image_fast.__all__) and own[0] in ABOVE:
            continue
        assert layer(top) <= layer(own[0]), f"{'.'.join(own)} imports {module}"
        if own[0] == "ops" and top == "ops":
            assert rest[0] in SHARED or own[1] == "__init__", f"{'.'.join(own)} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "training").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_training_goes_up(path):
    """recipe <- sources <- batches <- tasks <- engine <- run, and what stands between them."""
    own = ".".join(path.relative_to(ROOT / "training").with_suffix("").parts)
    if own in ("__init__", "__main__"):
        return
    for module in imports(path):
        top, _, name = module.partition(".")
        if top == "training" and name:
            assert floor(name) <= floor(own), f"training/{own} imports {name}"


def test_no_circles():
    """No file imports itself by way of others, imports inside of functions included."""
    names = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in names.items():
        found = {m if m in names else m.rpartition(".")[0] for m in imports(path)}
        graph[name] = (found & names.keys()) - {name}
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    circle = {name: sorted(needs & graph.keys()) for name, needs in graph.items()}
    assert not circle, f"circles among {circle}"


def test_lazy_names():
    """The table of names, what type checkers are told and `__all__` are one; no module hides a name."""
    (hints,) = [n for n in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(n, ast.If)]
    told = {a.name: n.module.removeprefix("qwen_image_fast.") for n in hints.body[1:-1] for a in n.names}
    assert told == qwen_image_fast._HOMES and sorted(told) == qwen_image_fast.__all__
    assert not set(told) & {p.stem for p in ROOT.iterdir()}
    assert set(told) <= set(dir(qwen_image_fast))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qwen_image_fast.nonsense


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_comes_after_torch(path):
    """`from qwen_image_fast import _C` goes through the package, which imports torch first; other ways do not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").endswith("_C") or node.module.endswith("torch._C"), path
        elif isinstance(node, ast.Import):
            assert "qwen_image_fast._C" not in [a.name for a in node.names], path


def test_only_the_drop_in_knows_diffusers():
    """And the two files whose methods are diffusers' own at work, imported when they are called."""
    known = ("drop_in", "doctor.py", "models/diffusers_hooks.py", "models/peft_adapters.py")
    for path in FILES:
        text = path.read_text()
        if "import diffusers" in text or "from diffusers" in text:
            own = path.relative_to(ROOT)
            assert {own.parts[0], own.as_posix()} & {*known}, path
