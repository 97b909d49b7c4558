"""`train`: what is to be trained, from options, recipes and changes; found and checked before anything is loaded."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_image_fast.cli.errors import CommandError, err
from qwen_image_fast.cli.training import Overrides, checked, explained
from qwen_image_fast.extras import needed_for
from qwen_image_fast.folders import nearest, nearest_file

if TYPE_CHECKING:
    from qwen_image_fast.training.engine.interrupts import Interrupted
    from qwen_image_fast.training.terminal import Terminal

AFTER_TRAINING = ("sft", "dpo", "grpo", "nft", "awm")  # kinds of recipes
Recipe = Annotated[str | None, typer.Argument(help="lora, edit-lora, another one of --list, or a YAML file.")]


def train(
    recipe: Recipe = None,
    overrides: Overrides = None,
    images: Annotated[str | None, typer.Option(help="Pictures with captions: a folder, a table or shards.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="A folder of pictures before and after; for dpo, sft: a file of preferences.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="tiny, a folder, or a hub name such as Qwen/Qwen-Image.")] = None,
    preset: Annotated[str | None, typer.Option(help="Fit a card: 12gb, 16gb, 24gb, 48gb or 80gb.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = Path("outputs/run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Resume with a recipe that differs.")] = False,
    list_them: Annotated[bool, typer.Option("--list", help="Print the recipes that there are.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe and what each field means.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what GPUS would need; train nothing.")] = False,
    gpus: Annotated[int, typer.Option(help="With --plan: how many.", min=1)] = 8,
    memory: Annotated[float, typer.Option(help="With --plan: GB of each.")] = 80.0,
    gpu: Annotated[str, typer.Option(help="With --plan: their kind, such as H100 or A100.")] = "H100",
) -> None:
    """Train by a recipe; the result is in OUT/model, logs and checkpoints beside it. Under torchrun: by all.

    `train lora --images my_pictures --model tiny` makes a LoRA. Values such as steps=500 or optimizer.lr=1e-3 change
    the recipe. `train export` and `train compare` work on what a run has made.
    """
    named = {"data.source": "--images" if images is not None else "--pairs" if pairs is not None else None}
    named["model.folder"] = "--model" if model is not None else None
    with explained(), _by_option(named):
        if list_them:
            print_recipes()
            return
        if recipe is None:
            raise CommandError("no recipe is named: lora and edit-lora begin your own work, --list prints all")
        changes = [*_from_options(recipe, images, pairs, model, look=not (plan or show)), *(overrides or ())]
        if preset is not None:
            if not show:  # counting loads torch
                checked(recipe, changes, data=not plan, run_folder=None if plan or resume else out)
            changes = _for_card(recipe, changes, preset)
        if show:
            print_recipe(recipe, changes)
            return
        chosen = checked(recipe, changes, data=not plan, run_folder=None if plan or resume else out)
        if resume and not plan:
            from qwen_image_fast.training.recipe.resume import check_resume

            check_resume(chosen, out.expanduser(), allow_changes)
        if plan:
            err.print(f"{chosen.name}: loading torch to count the weights", markup=False, soft_wrap=True)
            from rich.console import Console

            from qwen_image_fast.training.parallel.plan import print_plan

            print_plan(chosen, gpus, memory, gpu, Console(width=None if sys.stdout.isatty() else 120))
            return
        with needed_for("training"):
            import tensorboard  # noqa: F401  for the run's log, first asked for when the model is loaded

        from qwen_image_fast.training.recipe.names import files_of
        from qwen_image_fast.training.terminal import Terminal

        with Terminal(chosen.name, show=int(os.environ.get("RANK", "0")) == 0) as terminal:
            tasks = chosen.stages[0].recipe.data.tasks
            if pairs is not None and recipe != "edit-lora" and set(tasks) == {"ti2i"}:
                terminal.say(
                    f"{chosen.name}: pairs teach edits: what is trained changes a picture by an instruction, "
                    "as of `train edit-lora`"
                )
            if files := files_of(chosen):
                terminal.stage(f"looking at {files}")
            from qwen_image_fast.training.sources.survey import sources_of

            sources = sources_of(chosen)
            if preset is None:  # else it is there
                terminal.stage("loading torch")
            from qwen_image_fast.training.engine.interrupts import Interrupted
            from qwen_image_fast.training.run import train as run

            try:
                run(
                    recipe,
                    changes,
                    out,
                    resume=resume,
                    allow_changes=allow_changes,
                    sources=sources,
                    terminal=terminal,
                )
            except Interrupted as end:
                options = {
                    "--images": images,
                    "--pairs": pairs,
                    "--model": model,
                    "--preset": preset,
                    "--out": str(out),
                }
                given = [word for name, value in options.items() if value is not None for word in (name, value)]
                _say_how_to_go_on(terminal, end, ["train", recipe, *(overrides or ()), *given, "--resume"])
                raise SystemExit(128 + end.number) from None
    if int(os.environ.get("RANK", "0")) == 0:
        print(out / "model")


@contextmanager
def _by_option(options: Mapping[str, str | None]) -> Iterator[None]:
    """What is wrong with a field of the recipe is wrong with the option that gave it; None: none did."""
    try:
        yield
    except ValueError as error:
        for field, option in options.items():
            if option is not None and str(error).startswith(f"recipe: {field}"):
                raise CommandError(option + str(error).removeprefix(f"recipe: {field}")) from error
        raise


def _from_options(recipe: str, images: str | None, pairs: str | None, model: str | None, look: bool) -> list[str]:
    """The changes of a recipe that the options stand for. look: what they name must be there."""
    from qwen_image_fast.training.recipe.data import DRAWN
    from qwen_image_fast.training.recipe.fields import read_tree
    from qwen_image_fast.training.recipe.names import find_recipe

    if images is not None and pairs is not None:
        raise CommandError("give either --images or --pairs; data.mixture in a recipe of your own takes both")
    tree, changes = read_tree(find_recipe(recipe)), []

    def change(field: str, value: Any) -> None:
        changes.append(f"{field}={json.dumps(value, ensure_ascii=False)}")

    data = tree.get("data") or {} if isinstance(tree, dict) else {}
    if model is not None:
        change("folder" if tree.get("kind") == "vae" else "model.folder", model)
    after = tree.get("kind") in AFTER_TRAINING
    if after and pairs is not None:
        if tree.get("kind") not in ("dpo", "sft"):
            raise CommandError(f"--pairs has no effect on {recipe}, which draws its pictures")
        change("pairs", pairs)
        change("rollout", {})  # nothing is drawn
        pairs = None
    for option, source in (("--images", images), ("--pairs", pairs)):
        if source is None:
            continue
        if "mixture" in data or "stages" in tree:
            raise CommandError(f"{option} has no effect on {recipe}: its mixture or stages name their sources")
        here = source in DRAWN or source.startswith("hub:") or Path(source).expanduser().exists()
        what = "pictures with captions" if option == "--images" else "pictures before and after"
        if look and not here:
            near = nearest(source, DRAWN) or nearest_file(source)
            raise CommandError(f"{option} must be a folder of {what}, a table or shards, there is no {source}{near}")
        if look and Path(source).expanduser().is_dir() and not any(Path(source).expanduser().iterdir()):
            raise CommandError(f"{option} must be a folder of {what}, a table or shards, {source} is empty")
        change("data.source", source)
        if data.get("source") and "options" in data:  # of the source that this one replaces
            change("data.options", {})
    if pairs is not None:
        change("data.tasks", {"ti2i": 1.0})
    elif images is not None and set(data.get("tasks") or ()) == {"ti2i"}:
        raise CommandError(f"{recipe} learns from pairs: give --pairs instead of --images")
    return changes


def _for_card(recipe: str, changes: list[str], preset: str) -> list[str]:
    """The changes of a preset before those that are given, which win."""
    from qwen_image_fast.training.recipe.fitted import card
    from qwen_image_fast.training.recipe.names import find_recipe

    card(preset)
    first = int(os.environ.get("RANK", "0")) == 0
    path = find_recipe(recipe)
    if first:
        err.print(f"{recipe}: loading torch to count what a card of {preset} must hold", markup=False, soft_wrap=True)
    from qwen_image_fast.training.parallel.preset import preset_changes

    more, sentence = preset_changes(path, changes, preset)
    if first:
        err.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return [*more, *changes]


def print_recipes() -> None:
    from qwen_image_fast.training.recipe.names import shipped, summary

    width = max(map(len, shipped()))
    for name in shipped():
        print(f"{name:<{width}}  {summary(name)}")


def print_recipe(recipe: str, changes: list[str]) -> None:
    from qwen_image_fast.training.recipe.curriculum import read_curriculum
    from qwen_image_fast.training.recipe.meanings import written_out
    from qwen_image_fast.training.recipe.names import find_recipe

    print(written_out(read_curriculum(find_recipe(recipe), changes)))


def _say_how_to_go_on(terminal: Terminal, end: Interrupted, words: list[str]) -> None:
    """What an interrupted run has kept, and the command that resumes it."""
    again = shlex.join(["qwen-image-fast", *words])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        again = "the same torchrun command with --resume"
    for line in (str(end), f"go on with: {again}", "(--allow-changes beside it, where you change the recipe first)"):
        terminal.say(line)
