"""The command, as `qwen-image-fast` or `python -m qwen_image_fast`; Ctrl-C is heeded before more is imported."""

from __future__ import annotations

import _signal  # what signal wraps in enums, whose import takes longer than all before it
import codecs
import gc
import io
import os
import sys

TYPE_CHECKING = False  # that of typing, which is not imported yet, to type checkers
if TYPE_CHECKING:
    from types import FrameType


def main() -> None:
    # A shell starts what runs in the background with Ctrl-C ignored; that stays.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _interrupt)
    _write_any_text()
    _sleep_while_waiting()
    try:
        from qwen_image_fast.cli import app

        app()
    finally:
        # What is in cycles goes with the process: Python would look for it among all objects of torch and transformers
        # twice, which took most of the time between the last line and the end.
        gc.freeze()
        # All is said and written: what Python does on its way out needs no sentence.
        if _signal.getsignal(_signal.SIGINT) in (_interrupt, _leave):
            _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def _write_any_text() -> None:
    """What an output's encoding lacks is written as \\uXXXX, what a file's name has that is no text as its bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _sleep_while_waiting() -> None:
    """Before torch loads OpenMP's runtime: its threads sleep at once where they wait for each other, unless told else.

    As it comes, GNU's runtime spins for milliseconds first: on processors that others use too, a thread that spins
    takes the time of the one it waits for. Processes started from here inherit it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, so that half-written files are removed; the second time, and during an import, the end.

    What is being imported may swallow an exception or turn it into another one, and has nothing to remove.
    """
    _signal.signal(_signal.SIGINT, _leave)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave(*_: object) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # closed, or in the middle of a write
            continue
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
