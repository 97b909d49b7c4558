"""How the command fails: exit codes, and every way to fail as one sentence on standard error.

Exit codes: 0 done, 1 it failed (also: a kernel that disagrees, a damaged model), 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from qwen_image_fast.extras import MissingPackage
from qwen_image_fast.folders import nearest, nearest_file

out = Console()
err = Console(stderr=True)
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, (130, 143)


class CommandError(Exception):
    """A sentence for the user and the exit code that goes with it."""

    def __init__(self, sentence: str, code: int = BAD_INPUT) -> None:
        super().__init__(sentence)
        self.code = code


class Sentences(TyperGroup):
    """Turns every way to fail into one sentence and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would forget which signal it was
            raise typer.Exit(128 + getattr(error, "signal", signal.SIGINT)) from error

    def main(self, *args, **kwargs):
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
            code = result if isinstance(result, int) else DONE
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED[0]
        except CommandError as error:
            code = error.code
            print_error(error)
        except MissingPackage as error:
            code = BAD_INPUT
            print_error(error)
        except typer.BadParameter.__base__ as error:  # click's UsageError, of click or of the copy inside typer
            code = BAD_INPUT
            if sentence := error.format_message():  # none where the help is shown instead
                print_error(_unknown_option(error) or sentence + _advice(sentence, getattr(error, "ctx", None)))
        except Exception as error:
            code = BAD_INPUT if isinstance(error, FileExistsError) else FAILED  # the name that was asked for is taken
            _print_failure(error)
        if code in INTERRUPTED:
            err.print("interrupted")
        sys.exit(code)


def _unknown_option(error: Exception) -> str:
    """The sentence on an option that there is not, with what may have been meant; empty for another error."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", "")
    if context is None or not hasattr(error, "possibilities"):
        return ""
    parameters = context.command.params
    known = [name for p in parameters if p.param_type_name == "option" for name in p.opts if name.startswith("--")]
    near = nearest(option, known)
    if option in ("--force", "--replace") and "--overwrite" in known:
        near = "; did you mean --overwrite?"
    if not near and any(p.name == "overrides" for p in parameters):
        from qwen_image_fast.training.recipe.meanings import field_like

        if field := field_like(option.lstrip("-").replace("-", "_")):
            near = f"; {field} is a field of the recipe, changed by {field}=VALUE without dashes"
    return f"there is no option {option} of {context.command.name}{near or '; --help shows those that there are'}"


def _advice(sentence: str, context: typer.Context | None) -> str:
    """What to do with words that are too many."""
    if context is None or not sentence.startswith("Got unexpected extra argument"):
        return ""
    parameters = context.command.params
    takes = [p.name for p in parameters if p.param_type_name == "argument"]
    several = ", or give several by --prompts-file" if any(p.name == "prompts_file" for p in parameters) else ""
    if not takes:
        return ""
    return f": {context.command.name} takes one {takes[0]}; put quotes around one of several words{several}"


def print_error(sentence: object) -> None:
    err.print(f"[bold red]error:[/bold red] {escape(sentence_of(sentence))}", soft_wrap=True, highlight=False)


def sentence_of(error: object) -> str:
    """On one line, as said to somebody at a terminal: errors of the Python API begin with a function's name."""
    text = system_sentence(error) if isinstance(error, OSError) else str(error)
    text = re.sub(r"^[a-z]+(_[a-z0-9]+)+: ", "", " ".join(text.split()))
    return re.sub(r"^memory_limit\b", "--memory", text)  # as the option is called


def plain(text: object) -> str:
    """On one line, brackets as they are."""
    return escape(" ".join(str(text).split()))


def _print_failure(error: Exception) -> None:
    """Our own exceptions and those of the system are sentences; below any other stands where it came from."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    ours = frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])
    if is_out_of_memory(error):
        print_error(f"out of memory; smaller pictures, or fewer at a time, need less ({error})")
    elif isinstance(error, OSError):
        print_error(system_sentence(error))
    elif ours and isinstance(error, (ValueError, RuntimeError)):
        print_error(error)
    else:
        print_error(f"{type(error).__name__}: {error}")
        from rich.traceback import Traceback

        err.print(Traceback.from_exception(type(error), error, error.__traceback__))


def is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # whoever runs out of its memory has imported it
    return isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else [])))


def system_sentence(error: OSError) -> str:
    """What the system says, without the number of the error."""
    if error.strerror is None:
        return str(error)
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, (str, os.PathLike)):
        return f"there is no file {error.filename}{nearest_file(error.filename)}"
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


@contextmanager
def failing(code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds, whose message is a sentence, end the command with `code`."""
    try:
        yield
    except kinds as error:
        raise CommandError(system_sentence(error) if isinstance(error, OSError) else str(error), code) from error
