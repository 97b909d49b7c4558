"""The line that says what is going on, with a clock of our own."""

import io
import logging
import re

import pytest

from qwen_image_fast.cli import progress as module
from qwen_image_fast.cli.progress import Progress
from qwen_image_fast.serving import logs


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when we say so; no thread redraws."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.threading.Thread, "start", lambda self: None)
    return now


def work(progress, clock, steps=4, seconds=30.0):
    """A call of the pipeline: ten seconds before its steps, ten after them."""
    progress.stage("text encoder")
    clock[0] += 10
    progress.stage("denoise")
    for _ in range(steps):
        clock[0] += seconds
        progress.step()
    progress.stage("decode")
    clock[0] += 10


def test_the_time_left_is_measured_from_the_first_step(clock, capsys):
    with Progress(True) as progress:
        progress.stage("load x")
        clock[0] += 70
        progress.call("prompt 1 of 3", 4, 2)
        assert progress.left() is None
        progress.stage("denoise")
        assert progress.left() is None
        clock[0] += 30
        progress.step()
        assert progress.left() == 3 * 30 + 2 * 4 * 30
        assert progress.line() == "prompt 1 of 3, step 1/4, 0:30, about 5:30 left"
    assert capsys.readouterr().err.splitlines()[0] == "load x, 0:00"


def test_later_prompts_are_estimated_by_whole_earlier_ones(clock):
    with Progress(False) as progress:
        for n, after in ((1, 2), (2, 1)):
            progress.call(f"prompt {n} of 3", 4, after)
            work(progress, clock)
        progress.call("prompt 3 of 3", 4, 0)
        progress.stage("denoise")
        clock[0] += 15
        progress.step()
        assert progress.left() == 3 * 15
        assert progress.earlier == [140, 140]


def test_without_a_terminal_a_line_now_and_then(clock, capsys):
    with Progress(True) as progress:
        progress.call("", 1000, 0)
        work(progress, clock, steps=1000, seconds=1.0)
    lines = capsys.readouterr().err.splitlines()
    steps = [int(found[1]) for line in lines if (found := re.match(r"step (\d+)/1000, ", line))]
    assert steps[:2] == [0, 1] and 85 < len(steps) < 105 and not any("\r" in line for line in lines)


def test_on_a_terminal_one_line_and_files_above_it(clock, monkeypatch, capsys):
    screen = Screen()
    monkeypatch.setattr(module.sys, "stderr", screen)
    with Progress(True) as progress:
        progress.stage("load x")
        progress.say("x.png  seed 1")
        progress.note("something")
    shown = screen.getvalue()
    assert capsys.readouterr().out == "x.png  seed 1\n" and "x.png" not in shown
    assert shown.count("\n") == 1 and "note: something\n" in shown, "nothing but the note moves on"
    assert shown.startswith("\r\x1b[2Kload x, 0:00") and shown.endswith("\r\x1b[2K"), "the line is gone at the end"


def test_warnings_of_the_package_stand_above_the_line(clock, monkeypatch):
    screen, log = Screen(), logging.getLogger("qwen_image_fast.pipelines.generation")
    monkeypatch.setattr(module.sys, "stderr", screen)
    with Progress(True) as progress:
        progress.stage("load x")
        log.warning("a picture of %dx%d", 4000, 3000)
    assert "load x, 0:00\r\x1b[2Knote: a picture of 4000x3000\n" in screen.getvalue()
    assert progress.handler not in logging.getLogger("qwen_image_fast").handlers


def test_lines_of_a_servers_log_stand_above_the_line(clock, monkeypatch):
    screen, logger = Screen(), logging.getLogger("qwen_image_fast.serving")
    monkeypatch.setattr(module.sys, "stderr", screen)
    for each in (logger, logging.getLogger("uvicorn.error")):
        for name, value in (("handlers", []), ("propagate", True), ("level", 0)):
            monkeypatch.setattr(each, name, value)
    with Progress(True) as progress:
        progress.stage("load x")
        logs.to_stderr(around=progress.aside)
        logger.warning("one")
    logger.warning("two")
    erase, drawn = "\r\x1b[2K", "\r\x1b[2Kload x, 0:00"
    shown = re.sub(r"{.*}", "LOG", screen.getvalue())
    assert shown == f"{drawn}{erase}LOG\n{drawn}{erase}LOG\n", "once the line is gone, nothing is erased any more"


def test_quiet_but_for_notes_and_files(clock, capsys):
    with Progress(False) as progress:
        progress.call("prompt 1 of 2", 4, 1)
        work(progress, clock)
        progress.say("x.png")
        progress.note("y")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("x.png\n", "note: y\n")


def test_clocks():
    assert [module._clock(s) for s in (0, 59.9, 61, 3599, 3661)] == ["0:00", "0:59", "1:01", "59:59", "1:01:01"]
