"""What a run says, from before anything is loaded: on a terminal a bar that is redrawn, elsewhere now and then a line.

Imports no torch: the bar is there while it is imported.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

MEASURED = 5  # steps whose time says how long all will take; the first one of a run warms up and is left out
SECONDS = 10.0  # between lines where there is no terminal


class Terminal:
    """Between `with` and its end.

    Args:
        name: of the run. show: whether anything is said; of several ranks the first one speaks. lines: lines that begin
            with the name, and no bar: of several runs that share a terminal.
    """

    def __init__(self, name: str, show: bool = True, lines: bool = False):
        self.name, self.show, self.begins = name, show, f"{name}: " if lines else ""
        self.console = Console(stderr=True, quiet=not show)
        self.progress = _BarAndNumbers(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=self.console,
            disable=lines or not self.console.is_terminal,
        )  # fmt: skip
        self.bar = self.progress.add_task(name, total=None, line="", left="")
        self.handler = _Notes(self)
        self.steps, self.done, self.told = 0, 0, False
        self.ends: deque[float] = deque(maxlen=50)  # when the latest steps were done
        self.said = time.monotonic()

    def __enter__(self) -> Terminal:
        self.progress.start()
        logging.getLogger("qwen_image_fast").addHandler(self.handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("qwen_image_fast").removeHandler(self.handler)
        self.progress.stop()

    def stage(self, what: str) -> None:
        """What goes on before the first step, such as "loading tiny"."""
        self.progress.update(self.bar, description=f"{self.name}: {what}")
        if self.progress.disable:
            self.say(f"{self.name}: {what}")

    def begin(self, steps: int, done: int) -> None:
        """Training begins with update `done` of `steps`."""
        self.steps, self.done = steps, done
        self.progress.reset(self.bar, total=steps, completed=done, description=self.name, line="", left="")
        self.ends.clear()

    def step(self, done: int) -> None:
        """An update is done."""
        self.done = done
        self.ends.append(time.monotonic())
        left = self.left()
        self.progress.update(self.bar, completed=done, left="" if left is None else f"{clock(left)} left")
        if not self.told and left is not None and len(self.ends) > MEASURED:
            self.told = True
            end = time.strftime("%H:%M", time.localtime(time.time() + left))
            self.say(f"{self.seconds():.3g} s a step, measured over {MEASURED} steps: done at {end}, in {clock(left)}")
        if self.progress.disable and (len(self.ends) == 1 or time.monotonic() - self.said > SECONDS):
            self.say(f"step {done} of {self.steps}" + ("" if left is None else f", {clock(left)} left"))

    def pause(self, seconds: float) -> None:
        """So long was spent on something else than the steps."""
        self.ends = deque((end + seconds for end in self.ends), maxlen=self.ends.maxlen)

    def seconds(self) -> float:
        """Of a step, the mean of the latest ones."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    def left(self) -> float | None:
        """Seconds; None before two steps are done."""
        return None if len(self.ends) < 2 else self.seconds() * (self.steps - self.done)

    def line(self, text: str) -> None:
        """Numbers of the latest steps, below the bar; elsewhere as a line."""
        self.progress.update(self.bar, line=text)
        if self.progress.disable:
            left = self.left()
            self.say(f"step {self.done}  {text}" + (f"  {clock(left)} left" if left else ""))

    def doing(self, what: str) -> None:
        """What goes on between two updates and takes a while."""
        self.progress.update(self.bar, line=what)
        if self.progress.disable and time.monotonic() - self.said > SECONDS:
            self.say(f"step {self.done}  {what}")

    def say(self, sentence: str) -> None:
        self.said = time.monotonic()
        if not sentence.startswith(self.begins):
            sentence = self.begins + sentence
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


class _BarAndNumbers(Progress):
    """The numbers stand in a line of their own: beside them no bar is left on 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["line"]:
                yield Text(task.fields["line"], no_wrap=True, overflow="ellipsis")


class _Notes(logging.Handler):
    """The warnings of the package as notes, above the bar."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.say(f"note: {record.getMessage()}")


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some."""
    whole = round(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02d}"
