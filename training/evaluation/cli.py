"""The commands `evaluate text`, `evaluate edit`, `evaluate tiny`, `evaluate vision` and `evaluate bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_image_fast.files import claimed
from qwen_image_fast.folders import local_folder
from qwen_image_fast.training.evaluation.bench.cli import bench_command
from qwen_image_fast.training.evaluation.sizes import check_size

app = typer.Typer(help="Measure what a model can do.", no_args_is_help=True)
app.command("bench")(bench_command)


def _known(name: str) -> str:
    try:
        local_folder(name)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    return name


Model = Annotated[str, typer.Argument(help="diffusers-layout folder, hub name, or tiny", callback=_known)]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder for results.json and the pictures")]
Letters = Annotated[int, typer.Option(help="most letters of a synthetic text", min=2)]
Lines = Annotated[int, typer.Option(help="most texts of a synthetic picture", min=1)]
WordsOnly = Annotated[bool, typer.Option("--words-only", help="English words only, no random strings")]
Size = Annotated[int, typer.Option(help="height and width in pixels", min=32, callback=check_size)]
Steps = Annotated[int, typer.Option(help="denoising steps", min=1)]
Guidance = Annotated[float, typer.Option(help="true_cfg_scale; 1: none")]
Seed = Annotated[int, typer.Option(help="picture i gets seed + i")]
Batch = Annotated[int, typer.Option(help="pictures at a time", min=1)]


@app.command("text")
def text_command(
    model: Model = "tiny",
    out: Out = Path("outputs/evaluate-text"),
    prompts: Annotated[
        Path | None, typer.Option(help="a prompt a line, its texts in quotation marks; else unseen synthetic captions")
    ] = None,
    count: Annotated[int, typer.Option(help="synthetic captions of each language", min=1)] = 200,
    languages: Annotated[str, typer.Option(help="of the synthetic texts: en, zh or en,zh")] = "en",
    other_captions: Annotated[
        bool, typer.Option("--other-captions", help="captions in the other language than their texts")
    ] = False,
    lines: Lines = 1,
    letters: Letters = 6,
    words_only: WordsOnly = False,
    size: Size = 128,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch: Batch = 16,
    lora: Annotated[
        Path | None, typer.Option(help="a LoRA on the model, such as RUN/model: what it has unlearned", exists=True)
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="folder of a run before with the same prompts: won, lost, and a sign test")
    ] = None,
) -> None:
    """Draw texts, read them back, and count: exact match, CVTG-2K's word accuracy and NED, LongText-Bench's score."""
    typer.echo(f"{model}: loading torch and the reader", err=True)
    from tqdm import tqdm

    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
    from qwen_image_fast.training.evaluation import evaluate_text as report
    from qwen_image_fast.training.evaluation.cases import cases_of_file, held_out_cases
    from qwen_image_fast.training.evaluation.ocr import Reader

    recipes = [_recipe(name, letters, lines, words_only, float(other_captions)) for name in languages.split(",")]
    try:
        cases = cases_of_file(prompts) if prompts else [c for r in recipes for c in held_out_cases(r, count, seed)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    before = None
    if against is not None:
        try:
            before = report.results_before(against.expanduser(), cases)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    with claimed(out, "results.json"):
        reader, pipe = Reader(), QwenImagePipeline.from_pretrained(model)
        if lora is not None:
            pipe.load_lora_weights(lora)
        draw = report.drawn_by(pipe, seed=seed, height=size, width=size, **_sampling(steps, guidance))
        results = list(tqdm(report.evaluate(draw, cases, recipes[0], reader, batch), total=len(cases), unit="picture"))
        settings = {"prompts": str(prompts or "held-out synthetic captions"), "letters": letters, "lines": lines,
                    "words_only": words_only, "other_captions": other_captions, "size": size, "steps": steps,
                    "guidance": guidance, "seed": seed, "lora": str(lora or "none")}  # fmt: skip
        totals = report.write_report(results, out, settings, before)
    print(report.table(totals))
    if before and (changed := [k for k, v in settings.items() if before["settings"].get(k) != v]):
        print(f"settings that differ from those of {against}: {', '.join(changed)}")
    for language, values in totals.items():
        if found := values.get("against"):
            share = f"{found['won']} won, {found['lost']} lost, sign test p {found['p']:.3g}"
            print(f"exact against {against}, {language}: {share}")
        lengths = ", ".join(f"{n}: {right}/{of}" for n, (right, of) in values["exact_by_length"].items())
        print(f"exact by length of the longest text, {language}: {lengths}")
    print(f"results.json and pictures are in {out}")


@app.command("edit")
def edit_command(
    model: Model = "tiny",
    out: Out = Path("outputs/evaluate-edit"),
    kinds: Annotated[str, typer.Option(help="of text, colour, ground, add, remove, move, reconstruct")] = "text,colour",
    count: Annotated[int, typer.Option(help="pairs of each kind", min=1)] = 100,
    language: Annotated[str, typer.Option(help="en or zh")] = "en",
    lines: Lines = 1,
    letters: Letters = 6,
    words_only: WordsOnly = False,
    of_pictures: Annotated[
        bool, typer.Option("--of-pictures", help="sources as text to image draws them, things go to nine places")
    ] = False,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch: Batch = 16,
) -> None:
    """Edit synthetic pictures of 128 pixels with unseen words, read them back, and measure what else changed."""
    typer.echo(f"{model}: loading torch and the reader", err=True)
    from tqdm import tqdm

    from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
    from qwen_image_fast.training.evaluation import evaluate_edit as report
    from qwen_image_fast.training.evaluation.cases import held_out_edits
    from qwen_image_fast.training.evaluation.ocr import Reader

    recipe = replace(_recipe(language, letters, lines, words_only), edits_of_pictures=float(of_pictures))
    pairs = [pair for kind in kinds.split(",") for pair in held_out_edits(recipe, count, kind, seed)]
    with claimed(out, "results.json"):
        reader, pipe = Reader(), QwenImageEditPlusPipeline.from_pretrained(model)
        edit = report.edited_by(pipe, seed=seed, **_sampling(steps, guidance))
        results = list(tqdm(report.evaluate_edits(edit, pairs, reader, batch), total=len(pairs), unit="picture"))
        settings = {"kinds": kinds, "letters": letters, "lines": lines, "words_only": words_only,
                    "of_pictures": of_pictures, "size": 128, "steps": steps, "guidance": guidance,
                    "seed": seed}  # fmt: skip
        totals = report.write_report(results, out, settings)
    print(report.table(totals))
    print(f"results.json and pictures are in {out}")


@app.command("tiny")
def tiny_command(
    model: Model = "tiny",
    out: Out = Path("outputs/evaluate-tiny"),
    tasks: Annotated[str, typer.Option(help="all, or some, with commas between: single,two,edit move")] = "all",
    count: Annotated[int, typer.Option(help="pictures of each task", min=1)] = 50,
    size: Size = 128,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch: Batch = 16,
) -> None:
    """TinyEval: shapes, colours, numbers, places, texts and edits by fixed prompts, judged by pixels alone."""
    typer.echo(f"{model}: loading torch", err=True)
    from qwen_image_fast.training.evaluation import tiny_eval
    from qwen_image_fast.training.evaluation.page import markdown
    from qwen_image_fast.training.evaluation.tiny_models import TinyRun

    wanted = tiny_eval.TASKS if tasks == "all" else tuple(task.strip() for task in tasks.split(","))
    if unknown := [task for task in wanted if task not in tiny_eval.TASKS]:
        raise typer.BadParameter(f"--tasks must be of {', '.join(tiny_eval.TASKS)}, got {', '.join(unknown)}")
    with claimed(out, "results.json"):
        run = TinyRun(model, wanted, count, size, seed, batch, _sampling(steps, guidance))
        totals = tiny_eval.write_report(run.judged(), out, model, run.settings())
    print(markdown(tiny_eval.table(totals)))
    print(f"results.json and report.html are in {out}")


@app.command("vision")
def vision_command(
    model: Model = "tiny",
    out: Out = Path("outputs/evaluate-vision"),
    data: Annotated[
        Path | None, typer.Option(help="own pictures and their truth, a folder with metadata.jsonl; else drawn scenes")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="all, or some of depth,segment,view,edges,colourise; of --data the first three")
    ] = "all",
    count: Annotated[
        int | None, typer.Option(help="pictures of each task; default: 50, of --data all", min=1)
    ] = None,
    language: Annotated[str, typer.Option(help="of the instructions: en or zh")] = "en",
    size: Annotated[
        int | None,
        typer.Option(help="height and width in pixels, default 128; of --data the longest side, larger pictures are "
                          "reduced to it; default: none is", min=32),
    ] = None,
    depth_answers: Annotated[
        str | None, typer.Option(help="what the model draws for a depth of --data: inverse (default) or linear depth")
    ] = None,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    batch: Batch = 16,
) -> None:  # fmt: skip
    """Depth, segmentation, views, edges and colours by instruction, on scenes whose truth is known or on one's own
    pictures (--data); beside every score that of an answer which needs no model."""
    if not data:
        check_size(size or 128)
    from qwen_image_fast.training.synthesis.recipe import VISION

    known = ("depth", "segment", "view") if data else VISION
    wanted = known if tasks == "all" else tuple(task.strip() for task in tasks.split(","))
    if unknown := [task for task in wanted if task not in known]:
        raise typer.BadParameter(f"--tasks must be of {', '.join(known)}, got {', '.join(unknown)}")
    if language not in ("en", "zh"):
        raise typer.BadParameter(f"--language must be en or zh, got {language}")
    if depth_answers not in (None, "inverse", "linear"):
        raise typer.BadParameter(f"--depth-answers must be inverse or linear, got {depth_answers}")
    if depth_answers and not data:
        raise typer.BadParameter("--depth-answers must come with --data: a depth of scenes is inverse")
    settings: dict[str, Any] = {"tasks": ",".join(wanted)}
    asked: Any
    if data:
        typer.echo(f"{data}: checking the examples", err=True)
        from qwen_image_fast.training.evaluation.vision_data import Examples

        try:
            asked = Examples(data.expanduser(), wanted, count, language, size, depth_answers or "inverse")
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        settings |= {"data": str(data), "examples": asked.digest, "count": len(asked), "language": language,
                     "size": size or "of the picture", "depth answers": depth_answers or "inverse"}  # fmt: skip
    else:
        count, size = count or 50, size or 128
        settings |= {"count": count, "language": language, "size": size}
    typer.echo(f"{model}: loading torch and the model", err=True)
    from tqdm import tqdm

    from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
    from qwen_image_fast.training.evaluation import evaluate_vision as report
    from qwen_image_fast.training.evaluation.evaluate_edit import edited_by
    from qwen_image_fast.training.evaluation.page import markdown
    from qwen_image_fast.training.evaluation.tiny_models import each_through, through

    with claimed(out, "results.json"):
        if not data:
            asked = [task for kind in wanted for task in report.held_out_tasks(kind, count, size, language, seed)]
        pipe = QwenImageEditPlusPipeline.from_pretrained(model)
        edit = edited_by(pipe, seed=seed, **_sampling(steps, guidance))
        again = each_through if data else through
        found = report.evaluate(edit, asked, lambda pictures: again(pipe.vae, pictures), batch)
        settings |= {"steps": steps, "guidance": guidance, "seed": seed}
        totals = report.write_report(tqdm(found, total=len(asked), unit="picture"), out, model, settings)
    print(markdown(report.table(totals)))
    print(f"results.json and report.html are in {out}")


def _recipe(language: str, letters: int, lines: int, words_only: bool, other_captions: float = 0.0):
    from qwen_image_fast.training.synthesis.recipe import tiny

    changes: dict[str, Any] = {"max_letters": letters, "max_lines": lines, "other_captions": other_captions}
    return tiny(128, (language,), **changes, **({"random_strings": 0.0} if words_only else {}))


def _sampling(steps: int, guidance: float) -> dict[str, Any]:
    negative = " " if guidance > 1 else None
    return {"num_inference_steps": steps, "true_cfg_scale": guidance, "negative_prompt": negative}
