"""The command `qwen-image-fast`: generate, inspect, doctor, bench.

Exit codes: 0 done, 1 it failed (also: a kernel that disagrees, a damaged model), 2 bad input, 130 Ctrl-C. An error is
one sentence on standard error; what was asked for is on standard output, with `--json` as one JSON object.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.traceback import Traceback
from typer.core import TyperGroup

from qwen_image_fast import __version__, doctor, inspect_model, png_metadata
from qwen_image_fast.checkpoint import resolve_folder

out = Console()
err = Console(stderr=True)
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CommandError(Exception):
    """A sentence for the user and the exit code that goes with it."""

    def __init__(self, sentence: str, code: int = BAD_INPUT) -> None:
        super().__init__(sentence)
        self.code = code


class Commands(TyperGroup):
    """Turns every way to fail into one sentence and an exit code."""

    def main(self, *args, **kwargs):
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
            code = result if isinstance(result, int) else DONE
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except CommandError as error:
            code = error.code
            print_error(error)
        except typer.BadParameter.__base__ as error:  # click's UsageError, of click or of the copy inside typer
            code = BAD_INPUT
            print_error(error.format_message())
        except Exception as error:
            code = FAILED
            _print_failure(error)
        if code == INTERRUPTED:
            err.print("interrupted")
        sys.exit(code)


def print_error(sentence: object) -> None:
    err.print(f"[bold red]error:[/bold red] {_plain(sentence)}", soft_wrap=True, highlight=False)


def _plain(text: object) -> str:
    """On one line, brackets as they are."""
    return escape(" ".join(str(text).split()))


def _print_failure(error: Exception) -> None:
    """Our own exceptions and those of the system are sentences; below any other stands where it came from."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    ours = frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        print_error(f"out of memory; a smaller --size, fewer --images or --free-modulation need less ({error})")
    elif isinstance(error, OSError) or (ours and isinstance(error, (ValueError, RuntimeError))):
        print_error(error)
    else:
        print_error(f"{type(error).__name__}: {error}")
        err.print(Traceback.from_exception(type(error), error, error.__traceback__))


@contextmanager
def failing(code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds, whose message is a sentence, end the command with `code`."""
    try:
        yield
    except kinds as error:
        raise CommandError(str(error), code) from error


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"qwen-image-fast {__version__}", highlight=False)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context, version: Version = False) -> None:
    """Qwen-Image from fused kernels: make pictures, look into models, check and time this machine."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)


DTYPE_HELP = f"{', '.join(DTYPES)}."
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


# ---- generate ---------------------------------------------------------------------------------------------------


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="One prompt per line; # starts a comment line.")] = None,
    from_image: Annotated[Path | None, typer.Option(help="Repeat this picture; options given here win.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name.", show_default="Qwen/Qwen-Image")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to lead away from.", show_default="a space")] = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1: none.", show_default="4")] = None,
    size: Annotated[str | None, typer.Option(help=f"WxH, or {', '.join(RATIOS)}.", show_default="1024x1024")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="50")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**62, help="Of picture one.", show_default="new")] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures per prompt, computed together.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts computed together.")] = 1,
    max_sequence_length: Annotated[int | None, typer.Option(min=1, max=1024, help="Prompt tokens kept (512).")] = None,
    output: Annotated[Path, typer.Option(help="A .png file or an existing folder.")] = Path("."),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP, show_default="bfloat16 on a GPU, else float32")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU, if we have kernels.")] = "auto",
    lightning: Annotated[int | None, typer.Option(help="4 or 8 steps, for weights with Lightning merged in.")] = None,
    free_modulation: Annotated[bool, typer.Option("--free-modulation", help="Free these weights once used.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the files only, one per line.")] = False,
    as_json: JSON = False,
) -> None:
    """Make pictures and write them as PNG, with the parameters inside."""
    if lightning not in (None, 4, 8):
        raise CommandError(f"--lightning must be 4 or 8, got {lightning}")
    given = {name: value for name, value in context.params.items() if name in DEFAULTS and value is not None}
    stored = _stored(from_image)
    presets = {} if lightning is None else {"steps": lightning, "cfg": 1.0}
    chosen = DEFAULTS | stored | presets | given
    if not math.isfinite(chosen["cfg"]):
        raise CommandError(f"--cfg must be a finite number, got {chosen['cfg']}")
    if size is not None:
        chosen["width"], chosen["height"] = parse_size(size)
    prompts = _prompts(prompt, prompts_file, stored)
    chosen["device"] = _device(device)
    if chosen["dtype"] == "auto":
        chosen["dtype"] = "float32" if chosen["device"] == "cpu" else "bfloat16"
    weights_dtype = _dtype(chosen["dtype"])
    count = len(prompts) * images
    with failing(BAD_INPUT, ValueError):
        files = png_metadata.OutputFiles(output, overwrite, count)
    files.check_space(count * chosen["width"] * chosen["height"] * 3)

    show = not (quiet or as_json)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        pipe = _load(chosen, weights_dtype, free_modulation)
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
        with _timed(seconds, "write"):
            for i, (image, image_seed) in enumerate(zip(result.images, result.seeds, strict=True)):
                own = {"prompt": together[i // images], "seed": image_seed, "version": __version__}
                path = files.write(image, {**chosen, **own})
                made.append({"file": str(path), "seed": image_seed, "prompt": together[i // images]})
                if quiet and not as_json:
                    print(path, flush=True)
    if as_json:
        files_and_seeds = {"files": [m["file"] for m in made], "seeds": [m["seed"] for m in made]}
        common = {name: value for name, value in chosen.items() if name not in ("prompt", "seed")}
        _print_json({**files_and_seeds, "images": made, "parameters": common, "seconds": seconds})
    elif show:
        _print_made(made, seconds)


def _stored(from_image: Path | None) -> dict[str, Any]:
    """The parameters of the picture to repeat; a field this version does not know is left out."""
    if from_image is None:
        return {}
    with failing(BAD_INPUT, ValueError, OSError):
        found = png_metadata.read_parameters(from_image)
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
    if not (match := re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())):
        raise CommandError(f"--size must be WIDTHxHEIGHT or one of {', '.join(RATIOS)}, got {text}")
    return _check_size(int(match[1]), int(match[2]))


def _check_size(width: int, height: int) -> tuple[int, int]:
    if bad := [side for side in (width, height) if side < 16 or side % 16]:
        near = "x".join(str(max(16, round(side / 16) * 16)) for side in (width, height))
        raise CommandError(f"width and height must be multiples of 16, got {bad[0]} in {width}x{height}; try {near}")
    return width, height


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if doctor.has_cuda_kernels() else "cpu"
    with failing(BAD_INPUT, RuntimeError):
        kind = torch.device(name).type
    if kind not in ("cpu", "cuda"):
        raise CommandError(f"--device must be auto, cpu or cuda, got {name}")
    if kind == "cuda" and not doctor.has_cuda_kernels():
        why = "this build has no CUDA kernels" if torch.cuda.is_available() else "torch sees no GPU here"
        raise CommandError(f"--device {name} cannot be used: {why}; `qwen-image-fast doctor` says more")
    return name


def _load(chosen: dict[str, Any], dtype: torch.dtype, free_modulation: bool):
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
    from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler, lightning_config

    with failing(FAILED, ConnectionError, PermissionError), failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
        folder = resolve_folder(chosen["model"], allow_patterns=["model_index.json"])
    if not (folder / "model_index.json").is_file():
        raise CommandError(f"{chosen['model']} is not a pipeline's folder: it has no model_index.json")
    models = {"torch_dtype": dtype, "device": chosen["device"]}
    pipe = QwenImagePipeline.from_pretrained(chosen["model"], **models, free_modulation_weights=free_modulation)
    if chosen["lightning"] is not None:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **lightning_config())
    return pipe


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _print_made(made: list[dict[str, Any]], seconds: dict[str, float]) -> None:
    for m in made:
        out.print(f"[green]{_plain(m['file'])}[/green]  seed {m['seed']}", soft_wrap=True, highlight=False)
    table = Table("stage")
    table.add_column("seconds", justify="right")
    for stage, spent in seconds.items():
        table.add_row(stage, f"{spent:.2f}")
    out.print(table)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# ---- inspect, doctor, bench -------------------------------------------------------------------------------------


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or hub name; of the hub only json files and headers are read.")],
    margin: Annotated[
        float, typer.Option(min=0, help="GB allowed for activations in the table of what fits.")
    ] = inspect_model.MARGIN_GB,
    as_json: JSON = False,
) -> None:
    """Say what a model folder holds: configurations, parameters, memory by part and dtype, and what fits where."""
    with (
        failing(FAILED, ConnectionError, PermissionError),
        failing(BAD_INPUT, FileNotFoundError, NotADirectoryError, ValueError),
    ):
        found = inspect_model.inspect_model(model)
    if as_json:
        _print_json(inspect_model.as_json(found, margin))
    else:
        out.print(inspect_model.render(found, margin))
    for problem in found.problems:
        print_error(problem)
    if found.problems:
        raise typer.Exit(FAILED)


@app.command("doctor")
def doctor_command(as_json: JSON = False) -> None:
    """Show the environment and test every op, forward and backward, against its reference."""
    environment, verdicts = doctor.environment(), doctor.self_test()
    bad = [v for v in verdicts if v.problem]
    if as_json:
        _print_json({"environment": environment, "self_test": [vars(v) for v in verdicts], "agree": not bad})
    else:
        out.print(doctor.environment_table(environment))
        out.print(doctor.verdict_table(verdicts))
    for v in bad:
        print_error(f"{v.op}, {v.kernels} kernels, {v.dtype}: {v.problem}")
    if bad:
        raise typer.Exit(FAILED)
    if not as_json:
        out.print("[bold green]all kernels agree with their references[/bold green]")


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the tokens, fewer repetitions.")] = False,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    width: Annotated[int, typer.Option(min=128, help="Of the small transformer, a multiple of 128.")] = 768,
    as_json: JSON = False,
) -> None:
    """Time the ops and a small transformer on this CPU against the reference path, in turn; medians."""
    if width % 128:
        raise CommandError(f"--width must be a multiple of 128, got {width}")
    tokens, repeats = (256, 3) if quick else (1024, 11)
    timings = doctor.time_ops(tokens, 3072, _dtype(dtype), repeats)
    timings.append(doctor.time_transformer(tokens, width, _dtype(dtype), repeats))
    if as_json:
        _print_json({"dtype": dtype, "tokens": tokens, "timings": [vars(t) for t in timings]})
        return
    title = f"{tokens} tokens, ops of width 3072, {dtype}, {torch.get_num_threads()} threads"
    out.print(doctor.timing_table(timings, title))
    out.print("GB/s: inputs and results counted once. The reference is plain PyTorch, not torch.compile.", style="dim")


if __name__ == "__main__":
    app()
