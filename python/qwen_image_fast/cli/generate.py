"""`qwen-image-fast generate`: pictures from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_image_fast import __version__
from qwen_image_fast.cli import common
from qwen_image_fast.cli.errors import BAD_INPUT, CommandError, failing
from qwen_image_fast.output_files import OutputFiles

# The sizes that the model was tuned for, from the table in its README.
RATIOS = {
    "1:1": (1328, 1328),
    "16:9": (1664, 928),
    "9:16": (928, 1664),
    "4:3": (1472, 1104),
    "3:4": (1104, 1472),
    "3:2": (1584, 1056),
    "2:3": (1056, 1584),
}
DEFAULTS: dict[str, Any] = {**common.DEFAULTS, "model": "Qwen/Qwen-Image", "width": 1024, "height": 1024}


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One prompt per line; # starts a comment line.")] = None,
    from_image: common.FromImage = None,
    model: Annotated[str | None, typer.Option(help=common.MODEL_HELP, show_default="Qwen/Qwen-Image")] = None,
    negative_prompt: common.Negative = None,
    cfg: common.Cfg = None,
    size: Annotated[str | None, typer.Option(help=f"WxH, or {', '.join(RATIOS)}.", show_default="1024x1024")] = None,
    steps: common.Steps = None,
    seed: common.Seed = None,
    images: common.Images = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts computed together.")] = 1,
    max_sequence_length: Annotated[int | None, typer.Option(min=1, max=1024, help="Prompt tokens kept (512).")] = None,
    output: common.Output = Path("."),
    overwrite: common.Overwrite = False,
    dtype: common.Dtype = None,
    device: common.Device = "auto",
    lightning: common.Lightning = None,
    lora: common.Lora = None,
    free_modulation: common.FreeModulation = False,
    quiet: common.Quiet = False,
    as_json: common.JSON = False,
) -> None:
    """Make pictures and write them as PNG, with the parameters inside."""
    if prompt is not None and prompts_file is not None:
        raise CommandError("give either a prompt or --prompts-file, got both")
    chosen = common.parameters(context, DEFAULTS, from_image)
    if size is not None:
        chosen["width"], chosen["height"] = parse_size(size)
    common.check_size(chosen["width"], chosen["height"])
    prompts = _prompts(prompts_file, chosen["prompt"])
    count = len(prompts) * images
    with failing(BAD_INPUT, ValueError):
        files = OutputFiles(output, overwrite, count)
    files.check_space(count * chosen["width"] * chosen["height"] * 3)
    common.settle(chosen, device)

    show = not (quiet or as_json)
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        pipe = _load(chosen, free_modulation)
    made: list[dict[str, Any]] = []
    for first in range(0, len(prompts), batch):
        together = prompts[first : first + batch]
        result = pipe(
            together,
            negative_prompt=chosen["negative_prompt"] if chosen["cfg"] > 1 else None,
            true_cfg_scale=chosen["cfg"],
            height=chosen["height"],
            width=chosen["width"],
            num_inference_steps=chosen["steps"],
            num_images_per_prompt=images,
            seed=None if chosen["seed"] is None else chosen["seed"] + first * images,
            max_sequence_length=chosen["max_sequence_length"],
            progress=show,
        )
        for stage, spent in pipe.times.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
        with common.timed(seconds, "write"):
            for i, (image, image_seed) in enumerate(zip(result.images, result.seeds, strict=True)):
                own = {"prompt": together[i // images], "seed": image_seed, "version": __version__}
                path = files.write(image, {**chosen, **own})
                made.append({"file": str(path), "seed": image_seed, "prompt": together[i // images]})
                if quiet and not as_json:
                    print(path, flush=True)
    common.report_made(made, chosen, seconds, quiet, as_json)


def _prompts(prompts_file: Path | None, prompt: str | None) -> list[str]:
    if prompts_file is not None:
        try:
            lines = prompts_file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{prompts_file} could not be read as UTF-8 text: {error}") from error
        prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not prompts:
            raise CommandError(f"{prompts_file} holds no prompt")
        return prompts
    common.check_prompt(prompt, ", --prompts-file")
    return [str(prompt)]


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "1664x928" or "16:9"."""
    if text in RATIOS:
        return RATIOS[text]
    if (size := common.size_of(text)) is None:
        raise CommandError(f"--size must be WIDTHxHEIGHT or one of {', '.join(RATIOS)}, got {text}")
    return common.check_size(*size)


def _load(chosen: dict[str, Any], free_modulation: bool):
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

    common.model_class(chosen["model"])
    return common.load_pipeline(QwenImagePipeline, chosen, free_modulation)
