"""What a run shows on a terminal."""

from __future__ import annotations

import io
from functools import partial

import pytest
from rich.console import Console
from rich.text import Text

from qwen_image_fast.training import terminal


def test_all_of_it_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar with its numbers is not squeezed: each is whole, in a line of its own."""
    monkeypatch.setattr(terminal, "Console", partial(Console, file=io.StringIO(), force_terminal=True, width=80))
    shown = terminal.Terminal("lora")
    shown.begin(300, 20)
    shown.step(21)
    shown.step(22)
    numbers = "loss 0.0606  42.6 img/s  4107 tok/s  0.0768 TFLOP/s  data 1%  1.5 GB"
    shown.line(numbers)
    with shown.console.capture() as captured:
        shown.console.print(shown.progress.get_renderable())
    bar, below = Text.from_ansi(captured.get()).plain.splitlines()
    assert " 22/300 " in bar and bar.rstrip().endswith(" left") and below.rstrip() == numbers
