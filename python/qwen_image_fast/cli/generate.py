"""`qwen-image-fast generate`: pictures from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_image_fast import __version__, png_metadata
from qwen_image_fast.cli import common
from qwen_image_fast.cli.common import BAD_INPUT, CommandError, failing

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
DEFAULTS: dict[str, Any] = {
    "model": "Qwen/Qwen-Image",
    "negative_prompt": " ",
    "cfg": 4.0,
    "width": 1024,
    "height": 1024,
    "steps": 50,
    "seed": None,
    "max_sequence_length": 512,
    "dtype": "auto",
    "lightning": None,
}


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One prompt per line; # starts a comment line.")] = None,
    from_image: Annotated[Path | None, typer.Option(help="Repeat this picture; options given here win.")] = None,
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
    given = {name: value for name, value in context.params.items() if name in DEFAULTS and value is not None}
    stored = _stored(from_image)
    presets = {} if lightning is None else {"steps": lightning, "cfg": 1.0}
    chosen = DEFAULTS | stored | presets | given
    if size is not None:
        chosen["width"], chosen["height"] = parse_size(size)
    prompts = _prompts(prompt, prompts_file, stored)
    common.settle(chosen, device)
    count = len(prompts) * images
    with failing(BAD_INPUT, ValueError):
        files = png_metadata.OutputFiles(output, overwrite, count)
    files.check_space(count * chosen["width"] * chosen["height"] * 3)

    show = not (quiet or as_json)
    seconds: dict[str, float] = {}
    with common.timed(seconds, "load"):
        pipe = _load(chosen, free_modulation, lora)
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


def _stored(from_image: Path | None) -> dict[str, Any]:
    """The parameters of the picture to repeat; a field this version does not know is left out."""
    if from_image is None:
        return {}
    with failing(BAD_INPUT, ValueError, OSError):
        found = png_metadata.read_parameters(from_image)
    if (command := found.get("command", "generate")) != "generate":
        raise CommandError(f"{from_image} was made by `{command}`, from pictures that it does not hold")
    found["width"], found["height"] = _check_size(found["width"], found["height"])
    return {name: found[name] for name in ("prompt", *DEFAULTS) if name in found}


def _prompts(prompt: str | None, prompts_file: Path | None, stored: dict[str, Any]) -> list[str]:
    if prompt is not None and prompts_file is not None:
        raise CommandError("give either a prompt or --prompts-file, got both")
    if prompts_file is not None:
        try:
            lines = prompts_file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{prompts_file} could not be read as UTF-8 text: {error}") from error
        prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not prompts:
            raise CommandError(f"{prompts_file} holds no prompt")
        return prompts
    prompt = stored.get("prompt") if prompt is None else prompt
    if prompt is None:
        raise CommandError("nothing to make: give a prompt, --prompts-file or --from-image")
    if not prompt.strip():
        raise CommandError("the prompt is empty")
    return [prompt]


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "1664x928" or "16:9"."""
    if text in RATIOS:
        return RATIOS[text]
    if (size := common.size_of(text)) is None:
        raise CommandError(f"--size must be WIDTHxHEIGHT or one of {', '.join(RATIOS)}, got {text}")
    return _check_size(*size)


def _check_size(width: int, height: int) -> tuple[int, int]:
    if bad := [side for side in (width, height) if side < 16 or side % 16]:
        near = "x".join(str(max(16, round(side / 16) * 16)) for side in (width, height))
        raise CommandError(f"width and height must be multiples of 16, got {bad[0]} in {width}x{height}; try {near}")
    return width, height


def _load(chosen: dict[str, Any], free_modulation: bool, lora: list[str] | None):
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline

    common.model_class(chosen["model"])
    return common.load_pipeline(QwenImagePipeline, chosen, free_modulation, lora)
