"""Runs by the name or file of a recipe: what the commands `train` and `cache-latents` do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwen_image_fast.files import atomic_write, claimed
from qwen_image_fast.parallel.world import local_device, world_size
from qwen_image_fast.training.batches.latents import META, begin_cache, write_cache
from qwen_image_fast.training.engine.interrupts import Interrupted
from qwen_image_fast.training.engine.memory import available, check_recipe, gigabytes, transformer_config
from qwen_image_fast.training.engine.run_log import REJECTED, LeftOut
from qwen_image_fast.training.engine.trainer import Trainer, TrainingStopped
from qwen_image_fast.training.parallel.layout import (
    Parallel,
    check_recipe_parallel,
    check_torch,
    sizes_of,
    start,
)
from qwen_image_fast.training.parallel.watch import Watch, sentence
from qwen_image_fast.training.recipe.curriculum import Curriculum, one_stage, read_curriculum
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.names import (
    check_data,
    check_models,
    check_start,
    check_unused,
    described,
    find_recipe,
)
from qwen_image_fast.training.recipe.post import PostRecipe
from qwen_image_fast.training.recipe.resume import check_resume
from qwen_image_fast.training.recipe.vae import VaeRecipe
from qwen_image_fast.training.rollout.prompts import check_collecting
from qwen_image_fast.training.sources.sample import Source
from qwen_image_fast.training.sources.survey import named_by, said_of, sources_of
from qwen_image_fast.training.tasks.device import emulates, pick_device, pick_dtype
from qwen_image_fast.training.tasks.flow import FlowTask
from qwen_image_fast.training.tasks.post import PostTask
from qwen_image_fast.training.tasks.task import Task
from qwen_image_fast.training.tasks.vae import VaeTask
from qwen_image_fast.training.terminal import Terminal


def make_task(
    run: Curriculum,
    folder: Path,
    source: Source | None = None,
    parallel: Parallel | None = None,
    say: Callable[[str], Any] = lambda sentence: None,
    sources: dict[str, Source] | None = None,
    loading: Callable[[], Any] = lambda: None,
) -> Task:
    """What a run trains; `source` instead of those it names, which are looked at before any model is loaded. say: is
    told what the run will need. sources: those of `sources_of`, where they are there already. loading: is called
    when all that can be known before is known, and the models are loaded."""
    sources = looked_at(run, folder, say, sources) if source is None else {}
    recipe = run.stages[0].recipe
    if isinstance(recipe, FlowRecipe) and not recipe.lora.rank:
        say(_all_learn(recipe))
    if parallel is not None:
        assert isinstance(recipe, FlowRecipe)  # checked
        loading()
        return FlowTask(recipe, folder, source, run, parallel, sources)
    if isinstance(recipe, VaeRecipe):
        if len(run.stages) > 1:
            raise RecipeError("recipe: stages must be of kind flow")
        loading()
        return VaeTask(recipe, source or next(iter(sources.values())))
    device, left = pick_device(recipe.device), []
    for stage in run.stages:
        assert isinstance(stage.recipe, FlowRecipe)
        dtype = pick_dtype(stage.recipe.model.dtype, device)
        if emulates(dtype, device):
            say(f"{stage.name}: this processor has no unit for bfloat16; model.dtype=float32 is likely faster here")
        needed = check_recipe(stage.recipe, device, dtype)
        say(f"{stage.name}: {stage.recipe.steps} steps of {stage.recipe.batch * stage.recipe.accumulate} samples; "
            f"memory about {needed}, of {gigabytes(available(device))} that are free")  # fmt: skip
        left += [needed.under(limit).weights] if (limit := stage.recipe.model.memory) else []
    assert isinstance(recipe, FlowRecipe)
    for stage in run.stages:
        if isinstance(stage.recipe, PostRecipe):
            check_collecting(stage.recipe, folder, say)
    loading()
    kind = PostTask if any(isinstance(stage.recipe, PostRecipe) for stage in run.stages) else FlowTask
    return kind(recipe, folder, source, run, sources=sources, memory_limit=min(left, default=None))


def _to_stderr(sentence: str) -> None:
    tqdm.write(sentence, sys.stderr)


def _all_learn(recipe: FlowRecipe) -> str:
    what = "the transformer and of the condition encoder" if recipe.model.train_text_encoder else "the transformer"
    return f"all weights of {what} learn, no LoRA is made: lora.rank is 0; lora.rank=16 is a LoRA"


def looked_at(
    run: Curriculum, folder: Path, say: Callable[[str], Any], sources: dict[str, Source] | None = None
) -> dict[str, Source]:
    """The sources of a run, made here unless they are given; `say` is told what is in them."""
    sources = sources_of(run) if sources is None else sources
    for about in said_of(run, sources, folder):
        say(about)
    return sources


def train(
    recipe_path: str | Path,
    overrides: Any = (),
    folder: str | Path = "outputs/run",
    *,
    resume: bool = False,
    allow_changes: bool = False,
    source: Source | None = None,
    sources: dict[str, Source] | None = None,
    terminal: Terminal | None = None,
) -> Trainer:
    """Train to the end, on all processes that torchrun started.

    What the recipe names is looked for before anything is loaded. `terminal`: where it is followed, already shown.
    `sources`: of the recipe, by `sources_of`, where they were looked at already.

    Errors: RecipeError, FileExistsError for a folder in use, TrainingStopped, also where another rank dies, OSError;
    Interrupted where it was asked to end.
    """
    run, folder = read_curriculum(find_recipe(recipe_path), overrides), Path(folder).expanduser()
    check_models(run)
    check_start(run)
    if source is None:
        check_data(run)
    if resume:
        check_resume(run, folder, allow_changes)
    else:
        check_unused(folder)
    main = int(os.environ.get("RANK", "0")) == 0
    with (
        claimed(folder) if main else nullcontext(),
        nullcontext(terminal) if terminal is not None else Terminal(run.name, main) as shown,
    ):
        options: dict[str, Any] = {"resume": resume, "allow_changes": allow_changes, "terminal": shown}
        return _train(run, folder, source, sources, options)


def _train(
    run: Curriculum, folder: Path, source: Source | None, sources: dict[str, Source] | None, options: dict[str, Any]
) -> Trainer:
    first, terminal = run.stages[0].recipe, options["terminal"]
    if source is None:
        sources = sources_of(run) if sources is None else sources
        options["named"] = named_by(run, sources)
    sizes = sizes_of(first.parallel, world_size())

    def task(parallel: Parallel | None = None) -> Task:
        return make_task(
            run, folder, source, parallel, terminal.say, sources, lambda: terminal.stage(f"loading {described(run)}")
        )

    if sizes.world == 1:
        trainer = Trainer(run, task(), folder, **options)
        trainer.run()
        return trainer
    check_torch()
    for stage in run.stages:
        if isinstance(stage.recipe, PostRecipe):
            raise RecipeError(f"recipe: kind {stage.recipe.kind} must be run by one process, not under torchrun")
        if stage.recipe.parallel != first.parallel:
            raise RecipeError(f"recipe: parallel must be the same in all stages, it differs in {stage.name}")
        check_recipe_parallel(stage.recipe, sizes, transformer_config(first)["num_attention_heads"])
    parallel = start(sizes, local_device(pick_device(first.device)), first.parallel.timeout)
    made: list[Trainer] = []
    watch = Watch(parallel.rank, sizes.world, lambda: made[0].last_checkpoint() if made else "nothing was trained")
    watch.start()
    try:
        trainer = Trainer(run, task(parallel), folder, parallel=parallel, **options)
        made.append(trainer)
        trainer.run()
    except Interrupted:  # of all ranks alike
        watch.stop()
        raise
    except (RecipeError, FileExistsError, ValueError, TrainingStopped):  # every rank sees these alike
        watch.failed(RuntimeError("see its message"))
        raise
    except (RuntimeError, OSError) as error:
        kept = made[0].last_checkpoint() if made else "nothing was trained"
        raise TrainingStopped(sentence(watch.failed(error), kept)) from error
    watch.stop()
    return trainer


def cache_latents(
    recipe_path: str | Path,
    overrides: Any,
    folder: str | Path,
    count: int,
    sources: dict[str, Source] | None = None,
) -> None:
    """Write the first `count` samples of a flow recipe, encoded by its VAE, as a latent cache, and behind them those of
    validation.

    The VAE computes in the type of the recipe's model, in `producers.count` processes where the backend is that. Files
    that cannot be used are said, and listed in `rejected.jsonl`; others stand for them, as in training. What an
    interrupted call has written is not made again, if seed, data and VAE are the same.
    `sources`: as in `train`."""
    run, folder = read_curriculum(find_recipe(recipe_path), overrides), Path(folder).expanduser()
    recipe = run.stages[0].recipe
    if len(run.stages) > 1 or not isinstance(recipe, FlowRecipe) or recipe.data.cache:
        raise RecipeError("recipe: cache-latents needs kind flow without stages and data.cache")
    check_models(run)
    check_data(run)
    with claimed(folder, META):
        _cache_latents(recipe, folder, count, sources)


def _cache_latents(recipe: FlowRecipe, folder: Path, count: int, sources: dict[str, Source] | None) -> None:
    run = one_stage(recipe)
    sources = looked_at(run, folder, _to_stderr, sources)
    task = FlowTask(recipe, folder, sources=sources)
    maker = task.batches
    pixels = any(recipe.data.tasks.get(name) for name in ("ti2i", "recon"))
    workers = recipe.producers.count if recipe.producers.backend == "processes" else 0
    left_out, lines = LeftOut(named_by(run, sources)), []
    held_out = maker.to_hold_out
    total = count + held_out
    vae = task.pipe.vae.to(task.dtype)
    begun = begin_cache(folder, 4 * vae.config.z_dim, {
        "samples": count, "held_out": held_out, "seed": recipe.seed, "data": dataclasses.asdict(recipe.data),
        "vae": _digest(vae), "dtype": str(task.dtype), "device": task.device.type,
    })  # fmt: skip
    if begun.samples:
        _to_stderr(f"{recipe.name}: {begun.samples} samples are there, of a run that was interrupted")
    with tqdm(total=total, initial=begun.samples, unit="sample") as bar:

        def rejected(origin: str, reason: str) -> None:
            lines.append(json.dumps({"origin": origin, "reason": reason}, ensure_ascii=False) + "\n")
            if sentence := left_out.sentence(origin, reason):
                bar.write(sentence, sys.stderr)

        write_cache(
            folder, vae, partial(maker.to_cache, count=count), total, begun, pixels=pixels, workers=workers,
            progress=lambda done: bar.update(done - bar.n), rejected=rejected, held_out=held_out,
        )  # fmt: skip
        if lines:
            atomic_write(folder / REJECTED, lambda file: file.write("".join(lines).encode()))
            bar.write(f"{len(lines)} samples were left out for {count} used: {folder / REJECTED}", sys.stderr)


def _digest(module: torch.nn.Module) -> str:
    """Of all weights and buffers, in 16 digits."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
