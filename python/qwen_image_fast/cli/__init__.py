"""The command `qwen-image-fast`. Every command is a function of its own file; here they are put together."""

from __future__ import annotations

from typing import Annotated

import typer

from qwen_image_fast import __version__
from qwen_image_fast.cli.common import BAD_INPUT, Commands, out
from qwen_image_fast.cli.edit import controlnet, edit, layers
from qwen_image_fast.cli.generate import generate
from qwen_image_fast.cli.machine import bench, doctor_command, inspect
from qwen_image_fast.cli.training import cache_latents, data, train
from qwen_image_fast.training.evaluation.cli import app as evaluate

app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"qwen-image-fast {__version__}", highlight=False)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context, version: Version = False) -> None:
    """Qwen-Image from fused kernels: make and edit pictures, train, evaluate, look into models and this machine."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)


for command in (generate, edit, layers, controlnet, train, inspect, bench):
    app.command()(command)
app.command("doctor")(doctor_command)
app.command("cache-latents")(cache_latents)
app.add_typer(data, name="data")
app.add_typer(evaluate, name="evaluate")
