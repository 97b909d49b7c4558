"""Runs by the name or file of a recipe: what the commands `train` and `cache-latents` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_image_fast.training.curriculum import Curriculum, read_curriculum
from qwen_image_fast.training.memory import check_recipe
from qwen_image_fast.training.recipe import FlowRecipe, RecipeError, VaeRecipe, read_recipe
from qwen_image_fast.training.tiny.flow_task import FlowTask, pick_device, pick_dtype
from qwen_image_fast.training.tiny.latents import write_cache
from qwen_image_fast.training.tiny.sources import Source
from qwen_image_fast.training.trainer import Task, Trainer
from qwen_image_fast.training.vae import VaeTask

RECIPES = Path(__file__).parent / "recipes"


def find_recipe(name: str | Path) -> Path:
    """A file, or a shipped recipe by its name."""
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml")))
    raise RecipeError(f"recipe: there is no file {name}; shipped recipes: {shipped}")


def make_task(run: Curriculum, folder: Path, source: Source | None = None) -> Task:
    """What a run trains; `source` instead of those it names."""
    recipe = run.stages[0].recipe
    if isinstance(recipe, VaeRecipe):
        if len(run.stages) > 1:
            raise RecipeError("recipe: stages must be of kind flow")
        return VaeTask(recipe, source)
    device = pick_device(recipe.device)
    for stage in run.stages:
        assert isinstance(stage.recipe, FlowRecipe)
        check_recipe(stage.recipe, device, pick_dtype(stage.recipe.model.dtype, device))
    assert isinstance(recipe, FlowRecipe)
    return FlowTask(recipe, folder, source, run)


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
    run, folder = read_curriculum(find_recipe(recipe_path), overrides), Path(folder)
    trainer = Trainer(run, make_task(run, folder, source), folder, resume=resume, allow_changes=allow_changes)
    trainer.run()
    return trainer


def cache_latents(recipe_path: str | Path, overrides: Any, folder: str | Path, count: int) -> None:
    """Write the first `count` samples of a flow recipe, encoded by its VAE, as a latent cache.

    The VAE computes in the type of the recipe's model, in `producers.count` processes where the backend is that."""
    recipe, folder = read_recipe(find_recipe(recipe_path), overrides), Path(folder)
    if not isinstance(recipe, FlowRecipe) or recipe.data.cache:
        raise RecipeError("recipe: cache-latents needs kind flow without data.cache")
    task = FlowTask(recipe, folder)
    maker = task.batches
    pixels = any(recipe.data.tasks.get(name) for name in ("ti2i", "recon"))
    workers = recipe.producers.count if recipe.producers.backend == "processes" else 0
    with tqdm(total=count, unit="sample") as bar:
        write_cache(
            folder, task.pipe.vae.to(task.dtype), maker.to_cache, count, pixels=pixels, workers=workers,
            progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
