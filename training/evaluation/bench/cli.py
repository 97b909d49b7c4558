"""The command `evaluate bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_image_fast.folders import local_folder, nearest_file
from qwen_image_fast.training.evaluation.sizes import check_size

if TYPE_CHECKING:
    from qwen_image_fast.model_defaults import Generation
    from qwen_image_fast.training.evaluation.bench.items import Benchmark
    from qwen_image_fast.training.evaluation.bench.judges import Judge
    from qwen_image_fast.training.evaluation.bench.run import BenchRun

NAMES = ("geneval", "geneval2", "dpg", "oneig", "tiif", "cvtg", "chinese-word", "long-text", "gedit", "imgedit")


def bench_command(
    name: Annotated[str, typer.Argument(help=f"of {', '.join(NAMES)}")],
    model: Annotated[str, typer.Argument(help="diffusers-layout folder, hub name, or tiny")],
    prompts: Annotated[Path, typer.Option(help="where the benchmark's files are; docs/evaluation.md says which")],
    judge: Annotated[
        str | None,
        typer.Option(help="rapidocr, the address of an OpenAI-compatible endpoint, a folder with a vision-language "
                          "model or a detector, or a file of detections; without it only pictures are made"),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(help="folder with a CLIP: for the colours of geneval by a detector, and the CLIPScore of cvtg"),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="the judge's name at the address, and beside the scores")] = "",
    judge_key: Annotated[Path | None, typer.Option(help="file that holds the endpoint's key")] = None,
    judge_timeout: Annotated[float, typer.Option(help="seconds until an answer must be here", min=1)] = 120.0,
    parallel: Annotated[int, typer.Option(help="questions at a time", min=1)] = 4,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder; default outputs/bench-<name>")] = None,
    language: Annotated[str, typer.Option(help="of the benchmark's sets: en or zh")] = "",
    count: Annotated[int, typer.Option(help="only the first so many prompts; 0: all", min=0)] = 0,
    pictures: Annotated[int, typer.Option(help="of each prompt; 0: as the benchmark has it", min=0)] = 0,
    grids: Annotated[Path | None, typer.Option(help="folder of <id>.png, 2 x 2 pictures not to be drawn")] = None,
    size: Annotated[int | None, typer.Option(help="height and width in pixels; edits have their source's; default: as "
                                                  "the model's generation.json has it, or 1024", min=32,
                                             callback=check_size)] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: likewise, or 50", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="true_cfg_scale; 1: none; default: likewise, or 4")] = None,
    seed: Annotated[int, typer.Option(help="picture n of prompt i gets seed + i * pictures + n")] = 0,
    batch: Annotated[int, typer.Option(help="pictures at a time", min=1)] = 1,
) -> None:  # fmt: skip
    """Draw a public benchmark's prompts, have them judged, and score: each stage goes on where it was stopped."""
    if name not in NAMES:
        raise typer.BadParameter(f"the benchmark must be one of {', '.join(NAMES)}, got {name}")
    if not prompts.expanduser().exists():
        raise typer.BadParameter(
            f"--prompts must be the file or folder of the prompts of {name} that docs/evaluation.md names; there is no "
            f"{prompts}{nearest_file(prompts)}"
        )
    from qwen_image_fast.files import claimed
    from qwen_image_fast.training.evaluation.bench.benchmarks import BENCHMARKS
    from qwen_image_fast.training.evaluation.bench.judges import check_colours, find_clip, find_judge

    typer.echo(f"{name}: reading the prompts", err=True)
    benchmark = BENCHMARKS[name]
    language = language or benchmark.languages[0]
    if language not in benchmark.languages:
        raise typer.BadParameter(f"--language must be {' or '.join(benchmark.languages)} for {name}, got {language}")
    folder = out or Path(f"outputs/bench-{name}")
    try:
        who = scorer = None
        _check_effect(benchmark, name, judge, clip, judge_model, judge_key)
        if clip is not None and benchmark.ask_clip:
            scorer, clip = find_clip(clip), None
        if judge is not None:
            who = find_judge(judge, judge_model, benchmark.judges, judge_key, judge_timeout, clip)
        from qwen_image_fast.training.evaluation.bench.run import BenchRun, digest
        from qwen_image_fast.training.evaluation.page import markdown

        items = benchmark.load(prompts.expanduser(), language, folder / "sources")
        own = _own(model)
        sampling = {
            "size": size or (own.width if own.width == own.height else None) or 1024,
            "steps": steps or own.steps or 50,
            "guidance": next(value for value in (guidance, own.cfg, 4.0) if value is not None),
        }
        settings = {"model": model, "prompts": digest(items), **sampling, "seed": seed}
        if who is not None:
            check_colours(who, items[: count or None])
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("evaluate bench: ")) from error
    run = BenchRun(name, language, items[: count or None], pictures or benchmark.pictures, folder, settings)
    with claimed(folder):
        run.open()
        try:
            _draw(run, model, grids, batch)
            if who is None:
                print(f"pictures are in {folder / 'pictures'}; run again with --judge to score them")
                return
            rows, notes = _judged(run, who, scorer, parallel)
        except KeyboardInterrupt:
            typer.echo(f"\nwhat was drawn and answered is kept in {folder}: the same command goes on", err=True)
            raise
        print("\n".join([markdown(rows), *notes]))
    print(f"results.json and report.html are in {folder}")


def _check_effect(
    benchmark: Benchmark, name: str, judge: str | None, clip: Path | None, judge_model: str, judge_key: Path | None
) -> None:
    """ValueError for options of judging that would do nothing."""
    if clip is not None and not ("detections" in benchmark.judges or benchmark.ask_clip):
        raise ValueError(f"--clip must be left out: of {name} no score is by a CLIP, only of geneval and cvtg")
    given = {"--clip": clip, "--judge-model": judge_model, "--judge-key": judge_key}
    if judge is None and (option := next((option for option, value in given.items() if value), None)):
        what = "a detector's folder" if "detections" in benchmark.judges and clip else f"who judges pictures of {name}"
        raise ValueError(f"{option} must come with --judge, {what}; without --judge pictures are drawn and not scored")


def _own(model: str) -> Generation:
    """What the model makes best, where its folder is here and says so."""
    from qwen_image_fast.model_defaults import Generation, generation_of, model_class

    try:
        folder = local_folder(model)
        return Generation() if folder is None else generation_of(folder, model_class(folder, model))
    except OSError:  # whoever draws says so; pictures that are not to be drawn need no model
        return Generation()


def _draw(run: BenchRun, model: str, grids: Path | None, batch: int) -> None:
    missing = len(run.missing())
    if not missing:
        return
    if grids is not None:
        run.cut(grids)
        return
    try:
        local_folder(model)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    editing = run.items[0].source is not None
    size, steps, guidance = (run.settings[name] for name in ("size", "steps", "guidance"))
    total = len(run.items) * run.pictures
    there = f"{total - missing} pictures are there, " if missing < total else ""
    what = f"pictures of {'their sources' if editing else f'{size} x {size} px'}"
    how, options = f"in {steps} steps with guidance {guidance:g}", "--size, --steps, --guidance, --count"
    typer.echo(f"{there}{missing} {what} {how} are to be drawn ({options}); {model}: loading torch", err=True)
    from tqdm import tqdm

    from qwen_image_fast.training.evaluation.bench.drawing import drawn_by

    draw = drawn_by(
        model, editing, size, num_inference_steps=steps, true_cfg_scale=guidance,
        negative_prompt=" " if guidance > 1 else None,
    )  # fmt: skip
    with tqdm(total=total, initial=total - missing, unit="picture") as bar:
        run.draw(draw, run.settings["seed"], batch, bar.update)


def _judged(run: BenchRun, who: Judge, scorer: Judge | None, parallel: int) -> tuple[list[list[str]], list[str]]:
    from tqdm import tqdm

    asking = [who] if scorer is None else [who, scorer]
    with tqdm(total=sum(1 for one in asking for _ in run.questions(one.kind)), unit="answer") as bar:
        answers = {key: answer for one in asking for key, answer in run.judge(one, parallel, bar.update).items()}
    return run.score(who.name, answers, "" if scorer is None else scorer.name)
