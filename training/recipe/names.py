"""Finding what a recipe names: shipped recipes, models, data; `~` is the home folder. Imports no torch.

What cannot be is a sentence that offers the nearest name, before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path

from qwen_image_fast.folders import local_folder, nearest, nearest_file, resolve_folder
from qwen_image_fast.model_defaults import model_class
from qwen_image_fast.training.recipe.curriculum import Curriculum
from qwen_image_fast.training.recipe.data import DRAWN, UNNAMED, UNNAMED_PROMPTS
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import NEW, FlowRecipe
from qwen_image_fast.training.recipe.post import PostRecipe
from qwen_image_fast.training.recipe.vae import VaeRecipe

RECIPES = Path(__file__).parents[1] / "recipes"
_VAE_FILES = ("*.json", "vae/*", "diffusion_pytorch_model*.safetensors")


def find_recipe(name: str | Path) -> Path:
    """A file, or a shipped recipe by its name."""
    for path in (Path(name).expanduser(), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    if Path(name).expanduser().is_dir():
        raise RecipeError(
            f"recipe: {name} is a folder, not a recipe; `train lora --images {name}` trains on its pictures"
        )
    near = nearest(str(name), shipped()) or nearest_file(name)
    known = "" if near else f"; shipped recipes: {', '.join(shipped())}"
    raise RecipeError(f"recipe: there is no file {name}{known}{near}")


def shipped() -> list[str]:
    """Names of the shipped recipes, those that start a user's own work first."""
    names = [str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml")]
    return sorted(names, key=lambda name: ("/" in name, name))


def summary(name: str) -> str:
    """The first line of a shipped recipe, which says what it is for."""
    return find_recipe(name).read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")


def model_folder(name: str) -> Path:
    """The folder of a pipeline: local, "tiny", or downloaded."""
    return resolve_folder(name)


def vae_folder(name: str) -> Path:
    """The folder of a VAE, where `name` is that or a pipeline's."""
    folder = resolve_folder(name, allow_patterns=_VAE_FILES)
    return folder / "vae" if (folder / "vae").is_dir() else folder


def models_of(run: Curriculum) -> dict[str, str]:
    """The models that a run names, by field; all its stages have the same ones."""
    recipe, named = run.stages[0].recipe, {}
    if isinstance(recipe, FlowRecipe):
        named = {"model.folder": recipe.model.start, "model.vae": recipe.model.vae}
    elif isinstance(recipe, VaeRecipe):
        named = {"folder": recipe.folder}
    return {field: name for field, name in named.items() if name}


def described(run: Curriculum) -> str:
    """The models of a run, for a person: those named, and which are new."""
    named, recipe = models_of(run), run.stages[0].recipe
    if isinstance(recipe, FlowRecipe) and not recipe.model.start:
        return "a new model" + (f" with the VAE {recipe.model.vae}" if recipe.model.vae else ", its VAE random too")
    return ", ".join(named.values()) or "a new VAE"


def files_of(run: Curriculum) -> str:
    """The files that a run learns from, for a person; empty where everything is drawn, or cached."""
    parts = [part for stage in run.stages if stage.recipe.names_data for part in stage.recipe.data.parts]
    return ", ".join(dict.fromkeys(part.source for part in parts if part.source not in ("", *DRAWN)))


def check_models(run: Curriculum) -> None:
    """RecipeError where a model is named that is not there; names of hub repositories are believed."""
    for field, name in models_of(run).items():
        try:
            folder = local_folder(name)
        except OSError as error:
            raise RecipeError(f"recipe: {field}: {error}") from error
        if field == "model.folder" and folder is not None and not (folder / "model_index.json").is_file():
            raise RecipeError(f"recipe: {field} must be the folder of a pipeline, {name} has no model_index.json")
        if field == "model.folder" and folder is not None:
            held = model_class(folder, name)
            if not held.startswith("QwenImage"):
                raise RecipeError(f"recipe: {field} must be a Qwen-Image pipeline, {name} holds a {held}")


def check_start(run: Curriculum) -> None:
    """RecipeError where no model is named, or where a part of a new one, whose weights are random, would stay so."""
    recipe = run.stages[0].recipe
    if not isinstance(recipe, FlowRecipe) or recipe.model.start:
        return
    if not recipe.model.folder:
        raise RecipeError(
            "recipe: no model is named: give --model (model.folder), which is tiny, a folder or a hub name such as "
            f"Qwen/Qwen-Image; {NEW} trains one of tiny's shape from random weights"
        )
    frozen = "lora.rank is above 0" if recipe.lora.rank else "model.train_text_encoder is false"
    if recipe.lora.rank or not recipe.model.train_text_encoder:
        raise RecipeError(f"recipe: model.folder must name a model, such as Qwen/Qwen-Image, where {frozen}")


def check_unused(folder: Path) -> None:
    """FileExistsError where a run's folder has checkpoints already, or is a file."""
    if folder.is_file():
        raise FileExistsError(f"train: --out must be a folder, {folder} is a file")
    if found := sorted(path.parent.name for path in folder.glob("checkpoints/step-*/trainer.json")):
        raise FileExistsError(
            f"train: {folder} already has {found[-1]}; resume it (--resume) or choose another folder (--out)"
        )


def check_apart(run: Curriculum, folder: Path) -> None:
    """RecipeError where a run's folder lies in its data, which would have the run's sample pictures the next time."""
    there = folder.resolve()
    for part in (part for stage in run.stages for part in stage.recipe.data.parts):
        source = Path(part.source).expanduser()
        if part.source not in ("", *DRAWN) and source.is_dir() and there.is_relative_to(source.resolve()):
            raise RecipeError(
                f"recipe: --out must not be inside of the data, got {folder} in {part.source}: pictures of the run "
                "would be taken for data; name another folder"
            )


def check_data(run: Curriculum) -> None:
    """RecipeError where data are named that are not there."""
    for stage in run.stages:
        data = stage.recipe.data
        if isinstance(stage.recipe, PostRecipe):
            for field, name in (("pairs", stage.recipe.pairs), ("rollout.prompts", stage.recipe.rollout.prompts)):
                if name and Path(name).expanduser().is_dir():
                    raise RecipeError(f"recipe: {field} must be a file, {name} is a folder")
                if name and not Path(name).expanduser().is_file():
                    raise RecipeError(f"recipe: {field}: there is no file {name}{nearest_file(name)}")
        if not stage.recipe.names_data:
            continue
        if data.cache and not Path(data.cache).expanduser().is_dir():
            raise RecipeError(f"recipe: data.cache: there is no folder {data.cache}{nearest_file(data.cache)}")
        for part in data.parts:
            if not part.source and not data.cache:
                raise RecipeError(UNNAMED_PROMPTS if isinstance(stage.recipe, PostRecipe) else UNNAMED)
            here = part.source in DRAWN or part.source.startswith("hub:") or Path(part.source).expanduser().exists()
            if part.source and not here:
                near = nearest(part.source, DRAWN) or nearest_file(part.source)
                raise RecipeError(
                    f"recipe: data.source must be {', '.join(DRAWN)}, a folder, a table, shards or hub:owner/name, "
                    f"there is no {part.source}{near}"
                )
