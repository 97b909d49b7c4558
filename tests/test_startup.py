"""The first seconds: what is imported when, and Ctrl-C while it is."""

import functools
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

import qwen_image_fast
from qwen_image_fast import cli

HEAVY = {"torch", "transformers", "numpy", "PIL", "diffusers", "huggingface_hub", "safetensors"}
PROBE = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", *sorted({HEAVY | {"pydantic"}!r} & set(sys.modules)), file=sys.stderr))
from qwen_image_fast.__main__ import main
main()
"""
MAIN = "from qwen_image_fast.__main__ import main; main()"
# As installed or from the source tree.
PATHS = [str(Path(qwen_image_fast.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]


def environment(*before):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, before), *PATHS]), "OMP_NUM_THREADS": "1"}


def run(*args):
    return subprocess.run(args, capture_output=True, text=True, env=environment(), timeout=120)


@pytest.mark.parametrize("args", [["--help"], ["--version"], [], ["frobnicate"], ["--frobnicate"]], ids=" ".join)
def test_the_commands_names_need_nothing(args):
    result = run(sys.executable, "-c", PROBE, *args)
    assert result.returncode == (0 if args and args[0] in ("--help", "--version") else 2)
    assert not HEAVY & set(result.stderr.splitlines()[-1].split()), result.stderr
    if args == ["--help"]:
        assert "pydantic" not in result.stderr
        assert all(name in result.stdout for name in cli.COMMANDS)


def test_the_ops_do_not_bring_the_compiler_of_torch():
    code = "import sys; import qwen_image_fast.ops; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout.split() == ["True", "False"]


def test_the_page_of_a_run_needs_no_torch():
    code = "import sys; import qwen_image_fast.training.compare; print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout == "False\n"


@pytest.mark.parametrize(
    "args",
    [
        *([*name.split(), "--help"] for name in (*cli.COMMANDS, "data preview", "data filter", "evaluate text")),
        *([name, "--frobnicate"] for name in cli.COMMANDS),
        ["generate"],
        ["generate", "x", "--steps", "two"],
        ["generate", "x", "--size", "100x64"],
        ["generate", "x", "--dtype", "int8"],
        ["generate", "x", "--cfg", "nan"],
        ["generate", "x", "--output", "x.jpg"],
        ["edit", "x", "--dtype", "int8"],
        ["bench", "--width", "100"],
        ["data", "frobnicate"],
        ["train", "tiny/vea"],
        ["train", "tiny/1-shapes", "model.vae=tinny"],
        ["train", "tiny/vae", "data.source=sqares"],
        ["cache-latents", "tiny/1-shapes", "data.options.sizes=3", "model.folder=tinny"],
        ["evaluate", "text", "tinny"],
        ["evaluate", "text", "--size", "33"],
        ["evaluate", "vision", "--size", "33"],
        ["evaluate", "bench", "dpg", "tiny", "--prompts", "data", "--size", "33"],
        ["evaluate", "bench", "dpg", "tiny", "--prompts", "nowhere"],
    ],
    ids=" ".join,
)
def test_help_and_argument_errors_need_little(args):
    result = run(sys.executable, "-c", PROBE, *args)
    assert result.returncode == (0 if "--help" in args else 2), result.stderr
    assert not HEAVY & set(result.stderr.splitlines()[-1].split()), result.stderr
    assert ("error: " in result.stderr) == ("--help" not in args)


@pytest.mark.parametrize("options", ["dpg --judge nowhere", "dpg --judge .", "dpg --clip x", "geneval --clip x"])
def test_who_cannot_judge_is_refused_before_torch(tmp_path, options):
    name, *options = options.split()
    result = run(sys.executable, "-c", PROBE, "evaluate", "bench", name, "tiny", "--prompts", str(tmp_path), *options)
    assert result.returncode == 2 and "torch" not in result.stderr.splitlines()[-1].split(), result.stderr


@pytest.mark.parametrize(("command", "what"), [("train", ""), ("cache-latents", " and a new model with the VAE tiny")])
def test_training_says_what_it_loads_before_it_does(tmp_path, command, what):
    (tmp_path / "torch.py").write_text("import sys; print('torch is imported', file=sys.stderr); sys.exit(3)")
    args = [sys.executable, "-m", "qwen_image_fast", command, "tiny/1-shapes", "model.vae=tiny"]
    result = subprocess.run(args, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path, timeout=120)
    assert result.stderr.splitlines()[:2] == [f"tiny-1-shapes: loading torch{what}", "torch is imported"], result.stderr


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("doctor", "load torch, 0:00"),
        ("bench --quick", "load torch, 0:00"),
        ("inspect tiny", "read the headers of tiny, 0:00"),
        ("train tiny/1-shapes --plan", "tiny-1-shapes: loading torch to count the weights"),
        ("generate x --model tiny", "load tiny, 0:00"),
        ("edit x --image a.png --mask a.png --model tiny", "load tiny, 0:00"),
    ],
)
def test_the_first_line_comes_before_torch(tmp_path, command, line):
    (tmp_path / "torch.py").write_text("import sys; print('torch is imported', file=sys.stderr); sys.exit(3)")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "a.png")
    args = [sys.executable, "-m", "qwen_image_fast", *command.split()]
    result = subprocess.run(args, capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path, timeout=120)
    assert result.stderr.splitlines()[:2] == [line, "torch is imported"], result.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_says_what_the_command_says(name):
    command = typer.main.get_command(cli.app).commands[name]
    assert command.name == name
    assert command.load().help.split("\n")[0] == command.help


def test_the_end_looks_for_no_garbage():
    """It would go through every object of torch and transformers."""
    code = f"import atexit, gc; atexit.register(lambda: print(len(gc.get_objects()) < gc.get_freeze_count())); {MAIN}"
    result = run(sys.executable, "-c", code, "--version")
    assert result.stdout.splitlines()[-1] == "True", result.stderr


def test_the_package_alone_imports_nothing():
    code = f"import sys, qwen_image_fast; assert not {HEAVY!r} & set(sys.modules), sys.modules.keys()"
    assert run(sys.executable, "-c", code).returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        "from qwen_image_fast import _C",
        "import qwen_image_fast as q; q.build_info()",
        "import qwen_image_fast as q; q.ops.has_kernels",
        "from qwen_image_fast import *; QwenImagePipeline",
        "import qwen_image_fast.drop_in.accelerate, qwen_image_fast as q; assert callable(q.accelerate)",
    ],
)
def test_names_come_when_used_and_torch_before_the_core(code):
    order = "names = list(sys.modules); assert names.index('torch') < names.index('qwen_image_fast._C')"
    result = run(sys.executable, "-c", f"import sys; {code}; {order}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}], ids=str)
def test_threads_sleep_while_they_wait_unless_told_else(own):
    """The command says so before torch is imported; the package as a library leaves the environment alone."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {**{n: v for n, v in environment().items() if n not in names}, **own}
    told = f"print({{n: os.environ[n] for n in {names} if n in os.environ}}, 'torch' in sys.modules)"
    command = (
        f"import os, sys, atexit; atexit.register(lambda: {told}); from qwen_image_fast.__main__ import main; main()"
    )
    library = f"import os, sys, qwen_image_fast; qwen_image_fast.ops; {told}"
    for code, expected in ((command, own or {"OMP_WAIT_POLICY": "passive"}), (library, own)):
        result = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, env=env)
        assert result.stdout.splitlines()[-1] == f"{expected} {code == library}", result.stderr


def test_lazy_classes_are_pickled_by_name():
    for name in ("QwenImagePipeline", "AutoencoderKLQwenImage", "accelerate"):
        thing = getattr(qwen_image_fast, name)
        assert pickle.loads(pickle.dumps(thing)) is thing is getattr(qwen_image_fast, name)


def test_every_way_to_start_is_one_command():
    started = [run(sys.executable, "-m", f"qwen_image_fast{name}", "--help") for name in ("", ".cli")]
    assert all(s.returncode == 0 and "generate" in s.stdout for s in started)
    training = run(sys.executable, "-m", "qwen_image_fast.training", "--help")
    assert training.returncode == 0 and "Train by a recipe" in training.stdout


def test_ctrl_c_is_heeded_before_much_is_imported():
    """What comes before the handler is Python's own: a traceback there cannot be helped, so it must be short."""
    code = "import sys, qwen_image_fast.__main__; print(*sys.modules)"
    found = set(run(sys.executable, "-S", "-c", code).stdout.split())  # -S: what else is installed imports nothing
    assert "qwen_image_fast.__main__" in found and not found & {"enum", "re", "signal", "types", "typing"}


@pytest.mark.parametrize(
    "while_importing",
    [
        "os.read(0, 1)",
        "try:\n    os.read(0, 1)\nexcept BaseException:\n    pass",
        "try:\n    os.read(0, 1)\nexcept BaseException as e:\n    raise ImportError('no such symbol') from e",
    ],
    ids=["passed on", "swallowed", "turned into another"],
)
@pytest.mark.parametrize(
    "module, number", [("typer", signal.SIGTERM), ("typer", signal.SIGINT), ("torch", signal.SIGINT)]
)
def test_signals_while_importing(tmp_path, module, number, while_importing):
    """A module that stops in the middle of its import, at a read of a pipe that nobody writes to."""
    (tmp_path / f"{module}.py").write_text(f"import os\nos.write(1, b'importing')\n{while_importing}\n")
    # A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", "qwen_image_fast", "doctor"]
    with subprocess.Popen(command, env=environment(tmp_path), preexec_fn=heed, **pipes) as process:
        try:
            assert os.read(process.stdout.fileno(), 9) == b"importing"
            process.send_signal(number)
            _, stderr = process.communicate(timeout=600)
        finally:
            process.kill()
    assert (process.returncode, stderr.splitlines()[-1]) == (
        128 + number,
        b"interrupted",
    ) and b"Traceback" not in stderr
