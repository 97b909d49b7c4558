"""`train export` and `train compare`: what a run has made, as files to use and as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_image_fast.cli.training import explained

Run = Annotated[Path, typer.Argument(help="Folder of a run of `train`.")]


def export(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; the newest without it.", min=0)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The result; without it in RUN/exported.")] = None,
    style: Annotated[str, typer.Option("--format", help="Names in a LoRA file: diffusers or comfyui.")] = "diffusers",
) -> None:
    """Write what a run had learned at a checkpoint, to be used: a LoRA as one file, a model as its folder."""
    with explained():
        from qwen_image_fast.training.export import export as write

        print(write(run, out, step, style))


def compare(run: Run) -> None:
    """Write RUN/compare.html: sample pictures over the steps, the loss, and the loss by noise level."""
    with explained():
        from qwen_image_fast.training.compare import compare as write

        print(write(run))
