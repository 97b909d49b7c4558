"""The commands `evaluate text` and `evaluate edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import print as rich_print
from tqdm import tqdm

app = typer.Typer(help="Measure what a model can do.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="diffusers-layout folder or hub name")]
Out = Annotated[Path, typer.Option(help="folder for results.json and the pictures")]


@app.command("text")
def text_command(
    model: Model,
    out: Out = Path("outputs/evaluate-text"),
    prompts: Annotated[
        Path | None, typer.Option(help="a prompt a line, its texts in quotation marks; else unseen synthetic captions")
    ] = None,
    count: Annotated[int, typer.Option(help="synthetic captions of each language", min=1)] = 200,
    languages: Annotated[str, typer.Option(help="of the synthetic captions: en, zh or en,zh")] = "en",
    letters: Annotated[int, typer.Option(help="most letters of a synthetic text", min=2)] = 6,
    lines: Annotated[int, typer.Option(help="most texts of a synthetic picture", min=1)] = 1,
    words_only: Annotated[bool, typer.Option(help="English words only, no random strings")] = False,
    size: Annotated[int, typer.Option(help="height and width in pixels", min=32)] = 128,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float, typer.Option(help="true_cfg_scale; 1: none")] = 1.0,
    seed: Annotated[int, typer.Option(help="picture i gets seed + i")] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Draw texts, read them back, and count: exact match, CVTG-2K's word accuracy and NED, LongText-Bench's score."""
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
    from qwen_image_fast.training.evaluation.cases import cases_of_file, held_out_cases
    from qwen_image_fast.training.evaluation.evaluate_text import drawn_by, evaluate, table, write_report
    from qwen_image_fast.training.evaluation.ocr import Reader
    from qwen_image_fast.training.synthesis.recipe import tiny

    changes = {"max_letters": letters, "max_lines": lines} | ({"random_strings": 0.0} if words_only else {})
    recipes = [tiny(128, (language,), **changes) for language in languages.split(",")]
    cases = cases_of_file(prompts) if prompts else [c for r in recipes for c in held_out_cases(r, count, seed)]
    reader, pipe = Reader(), QwenImagePipeline.from_pretrained(model)
    draw = drawn_by(
        pipe, seed=seed, height=size, width=size, num_inference_steps=steps, true_cfg_scale=guidance,
        negative_prompt=" " if guidance > 1 else None,
    )  # fmt: skip
    judged = evaluate(draw, cases, recipes[0], reader, batch)
    results = list(tqdm(judged, total=len(cases), unit="picture"))
    settings = {"model": model, "prompts": str(prompts or "held-out synthetic"), "size": size, "steps": steps,
                "guidance": guidance, "seed": seed, "letters": letters, "lines": lines, "words_only": words_only,
                "batch": batch}  # fmt: skip
    totals = write_report(results, out, settings)
    print(table(totals))
    for language, values in totals.items():
        lengths = ", ".join(f"{n}: {right}/{of}" for n, (right, of) in values["exact_by_length"].items())
        print(f"exact by length of the longest text, {language}: {lengths}")
    rich_print(f"results.json and pictures are in {out}")
