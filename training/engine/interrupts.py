"""Ctrl-C and SIGTERM while a run trains: the step under way is finished and kept, and the run can go on from there."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to end, and what it had learned is on the disk.

    Attributes:
        number: of the signal. step, steps: updates made and to make. kept: what was written.
    """

    def __init__(self, number: int, step: int, steps: int, kept: list[Path]):
        self.number, self.step, self.steps, self.kept = number, step, steps, kept
        super().__init__(f"stopped after step {step} of {steps}; kept: {', '.join(map(str, kept))}")


class Interrupts:
    """From `with` to its end the first signal is noted, a second Ctrl-C ends the process at once.

    A second SIGTERM changes nothing: torchrun sends one behind the Ctrl-C that all processes of a terminal get.

    Attributes:
        asked: the number of the signal that came; 0: none did.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._now = False

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            # A shell starts what runs in the background with Ctrl-C ignored; that stays.
            heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def heeded_at_once(self) -> Iterator[None]:
        """For a block that may end anywhere, since nothing in it is trained: it ends with the signal."""
        self._now = True
        try:
            with contextlib.suppress(_EndOfBlock):
                yield
        finally:
            self._now = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT:
                os.write(2, b"stopped at once\n")
                os._exit(128 + number)
            return
        self.asked = number
        os.write(2, b"\nstopping: this step is finished and a checkpoint written; Ctrl-C again stops at once\n")
        if self._now:
            raise _EndOfBlock


class _EndOfBlock(BaseException):
    """Of `heeded_at_once`."""
