"""What a run tells: one progress line on the terminal, and TensorBoard and JSONL files always."""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qwen_image_fast.files import atomic_write


def memory_gb(device: torch.device) -> float:
    """The most memory used so far, in GB: allocated by torch on CUDA, resident of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6


REJECTED = "rejected.jsonl"
MOST_SAID = 50


class LeftOut:
    """What is said of files that are not used: of each one sentence, of one reason (its first words) for 50 files."""

    def __init__(self) -> None:
        self.origins: set[str] = set()
        self.reasons: Counter[str] = Counter()

    def sentence(self, origin: str, reason: str) -> str | None:
        """None where it was said before."""
        kind = reason.partition(":")[0]
        if origin in self.origins or self.reasons[kind] > MOST_SAID:
            return None
        self.reasons[kind] += 1
        if self.reasons[kind] > MOST_SAID:
            return f"more files are left out ({kind}): {REJECTED} lists them"
        self.origins.add(origin)
        return f"left out: {origin} ({reason})"


class RunLog:
    """Files `log.jsonl`, `tensorboard/` and `samples/` in the folder of a run, and the progress line.

    Args:
        folder: of the run. steps: in total. step: updates made before; later lines of an interrupted run are dropped,
            since they will be written again.
    """

    def __init__(self, folder: Path, name: str, steps: int, step: int = 0):
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "log.jsonl"
        _drop_after(path, step)
        _drop_after(folder / REJECTED, step)
        self.left_out = LeftOut()
        for line in _lines(folder / REJECTED):  # said before the run was interrupted
            self.left_out.sentence(line["origin"], line["reason"])
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed with the log
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.bar = self.progress.add_task(name, total=steps, completed=step, line="")
        self.progress.start()

    def advance(self, step: int) -> None:
        self.progress.update(self.bar, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One JSONL line and one TensorBoard point for each value; training metrics also become the progress line."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if "loss" in values:
            speed = f"{values['tflops']:.3g} TFLOP/s  " if "tflops" in values else ""
            line = (
                f"loss {values['loss']:.4f}  {values['images_per_s']:.1f} img/s  {values['tokens_per_s']:.0f} tok/s  "
                f"{speed}data {values['data_wait']:.0%}  {values['memory_gb']:.1f} GB"
            )
            self.progress.update(self.bar, line=line)
            if self.progress.disable:
                self.console.print(f"step {step}  {line}", highlight=False)
        else:
            words = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.console.print(f"step {step}  {words}", highlight=False)

    def say(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def rejected(self, step: int, samples: Iterable[tuple[int | None, str, str]]) -> None:
        """Keep which samples of a step (None: of its validation) could not be used, and why, in `rejected.jsonl`; say
        it of each file once."""
        for index, origin, reason in samples:
            if sentence := self.left_out.sentence(origin, reason):
                self.say(sentence)
            line = {"step": step, "sample": index, "origin": origin, "reason": reason}
            with open(self.folder / REJECTED, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def image(self, step: int, name: str, pixels: np.ndarray) -> Path:
        """Keep an image, uint8 [H, W, 3]."""
        path = self.folder / "samples" / f"{name}-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))
        self.board.add_image(name, pixels, step, dataformats="HWC")
        return path

    def close(self) -> None:
        self.progress.stop()
        self.board.close()
        self.file.close()


class SilentLog:
    """What the ranks other than the first tell: nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _drop_after(path: Path, step: int) -> None:
    kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(path) if line.get("step", 0) <= step]
    if path.exists():
        atomic_write(path, lambda file: file.write("".join(kept).encode()))


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: str) -> dict[str, Any] | None:
    """None for the half line that a kill leaves."""
    try:
        return json.loads(line)
    except ValueError:
        return None
