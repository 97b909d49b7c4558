"""The command, as `qwen-image-fast` or `python -m qwen_image_fast`; signals are heeded before more is imported."""

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


_USUAL = {_signal.SIGINT: _signal.default_int_handler, _signal.SIGTERM: _signal.SIG_DFL}


def main() -> None:
    # A shell starts what runs in the background with Ctrl-C ignored; that stays.
    for number, usual in _USUAL.items():
        if _signal.getsignal(number) is usual:
            _signal.signal(number, _interrupt)
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
        for number in _USUAL:
            if _signal.getsignal(number) in (_interrupt, _leave):
                _signal.signal(number, _signal.SIG_DFL)


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
    """KeyboardInterrupt, so that half-written files are removed, with the number of the signal as its `signal`; the
    second time, and during an import, the end.

    What is being imported may swallow an exception or turn it into another one, and has nothing to remove.
    """
    _signal.signal(number, _leave)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _leave(number)
        frame = frame.f_back
    error = KeyboardInterrupt()
    error.signal = number  # type: ignore[attr-defined]
    raise error


def _leave(number: int, frame: FrameType | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # closed, or in the middle of a write
            continue
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
