"""What is going on, on standard error: one line that is redrawn on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10.0  # between lines where there is no terminal


class Progress:
    """The stage, the step, the prompt of how many, and the time left, measured from the first step on.

    On a terminal a thread redraws the line twice a second, also while a long step says nothing.

    Args:
        show: whether anything is said.
    """

    def __init__(self, show: bool) -> None:
        self.show, self.terminal = show, sys.stderr.isatty()
        self.name, self.prompt, self.prompts, self.done, self.steps = "", "", 0, 0, 0
        self.earlier: list[float] = []  # the seconds of each call so far
        self.left_calls = 0
        self.since = self.call_since = self.denoise_since = time.monotonic()
        self.said = 0.0
        self.lock, self.closed = threading.RLock(), threading.Event()
        self.handler = _Notes(self)
        if show and self.terminal:
            threading.Thread(target=self._redraw, daemon=True).start()

    def __enter__(self) -> Progress:
        logging.getLogger("qwen_image_fast").addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more is said; the line goes."""
        logging.getLogger("qwen_image_fast").removeHandler(self.handler)
        with self.lock:
            self._erase()
            self.closed.set()

    def stage(self, name: str) -> None:
        """What begins now, such as "load tiny" or "decode"."""
        with self.lock:
            self.name, self.since = name, time.monotonic()
            if name == "denoise":
                self.denoise_since = self.since
            self._draw(always=not self.done or name != "denoise")

    def call(self, prompt: str, steps: int, calls_left: int) -> None:
        """A call of the pipeline begins: which prompts it is for, its steps, and how many calls come after it."""
        with self.lock:
            now = time.monotonic()
            if self.steps:
                self.earlier.append(now - self.call_since)
            self.prompt, self.done, self.steps, self.left_calls, self.call_since = prompt, 0, steps, calls_left, now

    def step(self, *_: object) -> dict:
        """A step is done; a callback of the pipelines."""
        with self.lock:
            self.done += 1
            self._draw(always=self.done == 1)
        return {}

    def say(self, line: str) -> None:
        """A line on standard output, above the one that is redrawn."""
        with self.lock:
            self._erase()
            print(line, flush=True)
            self._draw(always=False)

    def note(self, line: str) -> None:
        """A line on standard error, also where nothing else is shown."""
        with self.lock:
            self._erase()
            print(f"note: {line}", file=sys.stderr, flush=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For lines that others write to standard error, above the one that is redrawn."""
        with self.lock:
            self._erase()
            yield
            if self.terminal:
                self._draw(always=False)

    def left(self) -> float | None:
        """Seconds, from the steps of this call and the whole of earlier ones; None before the first step."""
        if not self.done:
            return None
        spent = time.monotonic() - self.denoise_since
        rest = spent / self.done * (self.steps - self.done)
        whole = sum(self.earlier) / len(self.earlier) if self.earlier else spent / self.done * self.steps
        return rest + self.left_calls * whole

    def line(self) -> str:
        parts = [self.prompt] if self.prompt else []
        if self.name == "denoise":
            parts.append(f"step {self.done}/{self.steps}")
        else:
            parts.append(self.name)
        parts.append(_clock(time.monotonic() - self.since))
        left = self.left()
        if left is not None:
            parts.append(f"about {_clock(left)} left")
        return ", ".join(parts)

    def _redraw(self) -> None:
        while not self.closed.wait(0.5):
            with self.lock:
                self._draw(always=False)

    def _draw(self, always: bool) -> None:
        if not self.show or self.closed.is_set() or not self.name:
            return
        now = time.monotonic()
        if self.terminal:
            width = shutil.get_terminal_size().columns
            sys.stderr.write("\r\x1b[2K" + self.line()[: width - 1])
            sys.stderr.flush()
        elif always or now - self.said > SECONDS:
            self.said = now
            print(self.line(), file=sys.stderr, flush=True)

    def _erase(self) -> None:
        if self.show and self.terminal and not self.closed.is_set():
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


class _Notes(logging.Handler):
    """The warnings of the package as notes, above the line that is redrawn."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.note(record.getMessage())


def _clock(seconds: float) -> str:
    """Minutes and seconds."""
    whole = int(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02d}"
