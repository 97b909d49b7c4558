"""`train export` and `train compare`: what a run has made, as files to use and as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_image_fast.cli.errors import CommandError, err
from qwen_image_fast.cli.training import explained
from qwen_image_fast.folders import nearest_file

Run = Annotated[Path, typer.Argument(help="Folder of a run of `train`.")]


def check_run(run: Path, part: str) -> None:
    """CommandError, before anything is loaded, where a folder of a run has nothing to be looked at."""
    if not (run.expanduser() / part).exists():
        raise CommandError(f"{run} must be the folder of a run of `train`, it has no {part}{nearest_file(run)}")


def export(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; the newest without it.", min=0)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The result; without it in RUN/exported.")] = None,
    style: Annotated[str, typer.Option("--format", help="Names in a LoRA file: diffusers or comfyui.")] = "diffusers",
) -> None:
    """Write what a run had learned at a checkpoint, to be used: a LoRA as one file, a model as its folder."""
    with explained():
        check_run(run, "checkpoints")
        err.print(f"{run}: loading torch and the checkpoint", markup=False, soft_wrap=True)
        from qwen_image_fast.training.export import export as write

        print(write(run, out, step, style))


def compare(run: Run) -> None:
    """Write RUN/compare.html: sample pictures over the steps, the loss, and the loss by noise level."""
    with explained():
        check_run(run, "log.jsonl")
        err.print(f"{run}: reading its log and pictures", markup=False, soft_wrap=True)
        from qwen_image_fast.training.compare import compare as write

        print(write(run))
