"""What a run tells: one progress line on the terminal, and TensorBoard and JSONL files always."""

from __future__ import annotations

import json
import resource
import sys
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
        _drop_after(folder / "rejected.jsonl", step)
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
        self.console.print(sentence, highlight=False, markup=False)

    def rejected(self, step: int, samples: Iterable[tuple[int, str, str]]) -> None:
        """Keep which samples of a step could not be used, and why, in `rejected.jsonl`."""
        for index, origin, reason in samples:
            line = {"step": step, "sample": index, "origin": origin, "reason": reason}
            with open(self.folder / "rejected.jsonl", "a", encoding="utf-8") as file:
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
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = _parse(line)
        if record is not None and record.get("step", 0) <= step:
            kept.append(line + "\n")
    atomic_write(path, lambda file: file.write("".join(kept).encode()))


def _parse(line: str) -> dict[str, Any] | None:
    """None for the half line that a kill leaves."""
    try:
        return json.loads(line)
    except ValueError:
        return None
