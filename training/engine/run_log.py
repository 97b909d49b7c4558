"""What a run tells: on the terminal, and in TensorBoard and JSONL files."""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.tasks.grid import grid
from qwen_image_fast.training.terminal import Terminal

if TYPE_CHECKING:  # what only reads a run needs no torch
    import torch

    from qwen_image_fast.training.tasks.task import Drawn


def memory_gb(device: torch.device) -> float:
    """The most memory used so far, in GB: allocated by torch on CUDA, resident of the process on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6


REJECTED = "rejected.jsonl"
SAMPLES, SAMPLES_INDEX = "samples", "samples.jsonl"
MOST_SAID = 50


class LeftOut:
    """What is said of files that are not used: of each one sentence, of one reason (its first words) for 50 files.

    Args:
        named: files of which it was said before.
    """

    def __init__(self, named: Iterable[str] = ()) -> None:
        self.origins = set(named)
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
    """Files `log.jsonl`, `tensorboard/` and `samples/` in the folder of a run, and what the terminal shows.

    Args:
        folder: of the run. terminal: where it is said. step: updates made before; later lines of an interrupted run are
            dropped, since they will be written again. named: files of which it was said before that they are left out.
    """

    def __init__(self, folder: Path, terminal: Terminal, step: int = 0, named: Iterable[str] = ()):
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "log.jsonl"
        _drop_after(path, step)
        for other in (REJECTED, f"{SAMPLES}/{SAMPLES_INDEX}"):
            _drop_after(folder / other, step)
        self.left_out = LeftOut(named)
        for line in _lines(folder / REJECTED):  # said before the run was interrupted
            self.left_out.sentence(line["origin"], line["reason"])
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed with the log
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.terminal, self.say = terminal, terminal.say

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
            self.terminal.line(line)
        else:
            words = "  ".join(
                f"{name} {value if isinstance(value, int) else f'{value:.4f}'}" for name, value in values.items()
            )
            self.say(f"step {step}  {words}")

    def rejected(self, step: int, samples: Iterable[tuple[int | None, str, str]]) -> None:
        """Keep which samples of a step (None: of its validation) could not be used, and why, in `rejected.jsonl`; say
        it of each file once."""
        for index, origin, reason in samples:
            if sentence := self.left_out.sentence(origin, reason):
                self.say(sentence)
            line = {"step": step, "sample": index, "origin": origin, "reason": reason}
            with open(self.folder / REJECTED, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def samples(self, step: int, drawn: Sequence[Drawn]) -> None:
        """Keep sample pictures of a step: a PNG for each, what was given beside what was made of it, a line in
        `samples.jsonl`, and all of them in TensorBoard."""
        folder, rows = self.folder / SAMPLES, []
        folder.mkdir(exist_ok=True)
        for number, one in enumerate(drawn):
            rows.append(grid(list(one.pictures)))
            name = f"step-{step:08d}-{number}.png"
            atomic_write(folder / name, lambda file: Image.fromarray(rows[-1]).save(file, format="PNG"))
            line = {"step": step, "number": number, "title": one.title, "file": name}
            with open(folder / SAMPLES_INDEX, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if rows:
            self.board.add_image("samples", grid(rows, columns=4), step, dataformats="HWC")

    def close(self) -> None:
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
