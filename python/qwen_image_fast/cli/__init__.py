"""The command `qwen-image-fast`: what its commands are called. A command's own module is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qwen_image_fast import __version__
from qwen_image_fast.cli.errors import BAD_INPUT, Sentences

# Where each command, or group of commands, is, and the first sentence of its help.
COMMANDS = {
    "generate": ("cli.pictures:generate", "Make pictures from prompts, or change one, and write them as PNG."),
    "edit": ("cli.pictures:edit", "Edit pictures by an instruction; the result keeps the exact size."),
    "layers": ("cli.pictures:layers", "Take a picture apart into transparent layers, back to front."),
    "controlnet": (
        "cli.pictures:controlnet",
        "Make pictures led by control pictures, or inpaint with an inpainting ControlNet.",
    ),
    "serve": ("cli.serve:serve", "Serve pictures over HTTP by OpenAI's images API."),
    "quantize": (
        "cli.quantize:quantize_command",
        "Write a transformer in 8 or 4 bits or in float8, in ComfyUI's layout; an interrupted run goes on.",
    ),
    "train": (
        "cli.train:train",
        "Train by a recipe; the result is in OUT/model, logs and checkpoints beside it. Under torchrun: by all.",
    ),
    "inspect": (
        "cli.machine:inspect",
        "Say what a model holds and which cards it fits, or what a picture was made with and how to repeat it.",
    ),
    "bench": (
        "cli.machine:bench",
        "Time the ops and a small transformer on this CPU against the reference path, in turn; medians.",
    ),
    "doctor": (
        "cli.machine:doctor_command",
        "Show the environment, test every op, forward and backward, against its reference, and make a picture.",
    ),
    "cache-latents": ("cli.training:cache_latents", "Encode a recipe's samples once, for its field data.cache."),
    "data": ("cli.training:data", "Look at training data."),
    "evaluate": ("training.evaluation.cli:app", "Measure what a model can do."),
}


# What follows a command's name and is no argument of it, but a command beside it.
WORDS = {"train": {"export": "cli.train_results:export", "compare": "cli.train_results:compare"}}


class _Later(TyperCommand):
    """A command of which only the name and the first sentence are known until it is used."""

    def __init__(self, name: str, place: str, sentence: str) -> None:
        super().__init__(name, help=sentence)
        self.place = place

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **kwargs: Any):
        place = WORDS.get(self.name or "", {}).get(args[0]) if args else None
        if place is not None:
            return self.load(place).make_context(f"{info_name} {args[0]}", args[1:], *more, **kwargs)
        return self.load().make_context(info_name, args, *more, **kwargs)

    def load(self, place: str = ""):
        module, attribute = (place or self.place).split(":")
        found = getattr(import_module(f"qwen_image_fast.{module}"), attribute)
        if isinstance(found, typer.Typer):
            group = typer.main.get_group(found)
            group.name = self.name
            return group
        own = typer.Typer(add_completion=False)
        own.command(self.name)(found)
        return typer.main.get_command(own)


class _Commands(Sentences):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands = {name: _Later(name, *found) for name, found in COMMANDS.items()}


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"qwen-image-fast {__version__}")
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context, version: Version = False) -> None:
    """Qwen-Image from fused kernels: make, edit and serve pictures, train, evaluate, look into models and machines."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)
