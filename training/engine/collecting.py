"""Between two updates: what a task collects to learn from, and what ends a run because of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from qwen_image_fast.training.rewards.reward import RewardError
from qwen_image_fast.training.tasks.task import Collects, StopRun
from qwen_image_fast.training.terminal import Terminal


class TrainingStopped(RuntimeError):
    """The loss or a gradient is not finite, or a task must not go on: which batch, and what is left to go on from."""


def collect(task: Any, batches: list[Any], step: int, log: Any, terminal: Terminal, keep: Callable[[], str]) -> None:
    """What the updates from `step` on learn from, where a task collects and it is due.

    Args:
        keep: has a checkpoint of this step, and says where it is.

    Raises:
        TrainingStopped: the task must not go on, or a reward cannot be had.
    """
    if not isinstance(task, Collects):
        return
    start = time.perf_counter()
    try:
        values = task.collect(batches, terminal.doing)
    except (StopRun, RewardError) as error:
        raise TrainingStopped(f"train: {error}; {keep()}") from error
    if values:
        log.metrics(step, values)
        terminal.pause(time.perf_counter() - start)
    for sentence in task.said():
        log.say(sentence)
