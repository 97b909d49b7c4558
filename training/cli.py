"""The commands `train` and `cache-latents`, which the main command mounts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from qwen_image_fast.training.memory import check_recipe
from qwen_image_fast.training.recipe import FlowRecipe, RecipeError, RunRecipe, VaeRecipe, read_recipe
from qwen_image_fast.training.tiny.batches import FlowBatches
from qwen_image_fast.training.tiny.flow_task import FlowTask, pick_device, pick_dtype
from qwen_image_fast.training.tiny.latents import write_cache
from qwen_image_fast.training.tiny.sources import Source, make_source
from qwen_image_fast.training.trainer import Task, Trainer
from qwen_image_fast.training.vae import VaeTask

app = typer.Typer(help="Train the models.", no_args_is_help=True)
RECIPES = Path(__file__).parent / "recipes"

RecipeArgument = Annotated[str, typer.Argument(help="YAML file, or a shipped recipe such as tiny/vae")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes such as optimizer.lr=1e-3")]


@app.command("train")
def train_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("outputs/run"),
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint in the folder")] = False,
    allow_changes: Annotated[bool, typer.Option(help="resume with a recipe that differs")] = False,
) -> None:
    """Train by a recipe; the result is in <out>/model, logs and checkpoints beside it."""
    train(recipe, overrides or (), out, resume=resume, allow_changes=allow_changes)


@app.command("cache-latents")
def cache_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder of the cache")] = Path("outputs/latents"),
    count: Annotated[int, typer.Option(help="samples", min=1)] = 10000,
) -> None:
    """Encode a recipe's samples once, for its field data.cache."""
    cache_latents(recipe, overrides or (), out, count)


def find_recipe(name: str | Path) -> Path:
    """A file, or a shipped recipe by its name."""
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml")))
    raise RecipeError(f"recipe: there is no file {name}; shipped recipes: {shipped}")


def make_task(recipe: RunRecipe, folder: Path, source: Source | None = None) -> Task:
    """What the recipe trains; `source` instead of the one it names."""
    if isinstance(recipe, VaeRecipe):
        return VaeTask(recipe, source)
    assert isinstance(recipe, FlowRecipe)
    device = pick_device(recipe.device)
    check_recipe(recipe, device, pick_dtype(recipe.model.dtype, device))
    return FlowTask(recipe, folder, source)


def train(
    recipe_path: str | Path,
    overrides: Any = (),
    folder: str | Path = "outputs/run",
    *,
    resume: bool = False,
    allow_changes: bool = False,
    source: Source | None = None,
) -> Trainer:
    """Train to the end. Errors: RecipeError, FileExistsError for a folder in use, TrainingStopped, OSError."""
    recipe, folder = read_recipe(find_recipe(recipe_path), overrides), Path(folder)
    trainer = Trainer(recipe, make_task(recipe, folder, source), folder, resume=resume, allow_changes=allow_changes)
    trainer.run()
    return trainer


def cache_latents(recipe_path: str | Path, overrides: Any, folder: str | Path, count: int) -> None:
    """Write the first `count` samples of a flow recipe, encoded by its VAE, as a latent cache."""
    recipe, folder = read_recipe(find_recipe(recipe_path), overrides), Path(folder)
    if not isinstance(recipe, FlowRecipe) or recipe.data.cache:
        raise RecipeError("recipe: cache-latents needs kind flow without data.cache")
    task = FlowTask(recipe, folder)
    maker = FlowBatches(recipe, make_source(recipe.data), task.transformer.config.in_channels)
    pixels = any(recipe.data.tasks.get(name) for name in ("ti2i", "recon"))
    with tqdm(total=count, unit="sample") as bar:
        write_cache(
            folder, task.pipe.vae, maker.to_cache, count, pixels=pixels, progress=lambda done: bar.update(done - bar.n)
        )
