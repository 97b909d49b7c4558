"""What a run had learned at a checkpoint, in the form in which it is used: what `train export` does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from qwen_image_fast.checkpoint import read_json
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.engine import checkpoint as checkpoints
from qwen_image_fast.training.lora import LORAS, for_comfyui
from qwen_image_fast.training.recipe.curriculum import one_stage
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.read import build
from qwen_image_fast.training.recipe.vae import VaeRecipe
from qwen_image_fast.training.sources.squares import Squares
from qwen_image_fast.training.sources.survey import sources_of
from qwen_image_fast.training.tasks.flow import FlowTask
from qwen_image_fast.training.tasks.task import Task
from qwen_image_fast.training.tasks.vae import VaeTask

FORMATS = ("diffusers", "comfyui")


def export(run: str | Path, out: str | Path | None = None, step: int | None = None, style: str = "diffusers") -> Path:
    """Write the averaged weights of a checkpoint and return where: adapters as one file, a model as its folder.

    Args:
        run: folder of the run. out: of the result; None: in `exported/` of the run. step: of the checkpoint; None: the
            newest. style: of the keys of adapters, diffusers' or ComfyUI's.

    Raises:
        RecipeError: there is no such checkpoint; the sentence names those that there are. FileExistsError: `out` is
        there.
    """
    run = Path(run).expanduser()
    if style not in FORMATS:
        raise RecipeError(f"export: --format must be one of {', '.join(FORMATS)}, got {style!r}")
    there = {_step(path): path for path in checkpoints.checkpoints(run / "checkpoints")}
    adapters = {_step(path): path for path in (run / LORAS).glob("step-*.safetensors")}
    found = adapters or there
    if not found:
        raise RecipeError(f"export: {run} is no folder of a run with checkpoints")
    step = max(found) if step is None else step
    if step not in found:
        steps = ", ".join(map(str, sorted(found)))
        raise RecipeError(f"export: {run} has no checkpoint of step {step}; there are {steps}")
    name = f"step-{step:08d}" + (f"-{style}.safetensors" if adapters else "")
    place = Path(out).expanduser() if out is not None else run / "exported" / name
    if place.exists():
        raise FileExistsError(f"export: {place} is already there; choose another name (--out)")
    place.parent.mkdir(parents=True, exist_ok=True)
    if adapters:
        _rewrite(adapters[step], place, style)
    elif style == "comfyui":
        raise RecipeError("export: --format comfyui is for adapters; this run trains whole weights")
    else:
        _export_model(there[step], run, place)
    return place


def _step(path: Path) -> int:
    match = re.match(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def _rewrite(file: Path, place: Path, style: str) -> None:
    if style == "diffusers":
        atomic_write(place, lambda out: shutil.copyfileobj(file.open("rb"), out))
        return
    with safe_open(file, "pt") as opened:
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
        texts = opened.metadata()
    content = save({n: t.contiguous() for n, t in for_comfyui(state).items()}, texts)
    atomic_write(place, lambda out: out.write(content))


def _export_model(checkpoint: Path, run: Path, place: Path) -> None:
    """The task of the run, with the checkpoint's averaged weights, writes what it writes at the end."""
    tree = read_json(checkpoint / checkpoints.RECORD)["recipe"]
    tree = {name: value for name, value in (tree["stages"][0] if "stages" in tree else tree).items() if name != "carry"}
    recipe = build(tree)
    task: Task
    if isinstance(recipe, VaeRecipe):
        task = VaeTask(recipe, next(iter(sources_of(one_stage(recipe)).values())))
    else:
        assert isinstance(recipe, FlowRecipe)
        task = FlowTask(recipe, run, Squares())  # what it learned from is not needed
    state = checkpoints.load(checkpoint)
    with torch.no_grad():
        for module, part in task.modules.items():
            for name, parameter in part.named_parameters():
                if (average := state.ema.get(f"{module}.{name}")) is not None:
                    parameter.copy_(average)
    building = place.with_name(f".{place.name}-building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        task.export(building)
        building.replace(place)
    finally:
        shutil.rmtree(building, ignore_errors=True)
