"""What all commands share: the app's errors and exit codes, devices, types, loading, printing.

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

from qwen_image_fast import doctor, png_metadata
from qwen_image_fast.folders import read_json, resolve_folder

out = Console()
err = Console(stderr=True)
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
MODEL_HELP = "Folder or hub name; tiny: the model that comes with the package."
# What all pictures are made with.
DEFAULTS: dict[str, Any] = {
    "prompt": None,
    "negative_prompt": " ",
    "cfg": 4.0,
    "steps": 50,
    "seed": None,
    "max_sequence_length": 512,
    "dtype": "auto",
    "lightning": None,
    "lora": None,
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
    ours = frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])
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


DTYPE_HELP = f"{', '.join(DTYPES)}."
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Dtype = Annotated[str | None, typer.Option(help=DTYPE_HELP, show_default="bfloat16 on a GPU, else float32")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU, if we have kernels.")]
Cfg = Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1: none.", show_default="4")]
Negative = Annotated[str | None, typer.Option(help="What to lead away from.", show_default="a space")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="50")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**62, help="Of picture one.", show_default="new")]
Images = Annotated[int, typer.Option(min=1, help="Pictures per prompt, computed together.")]
Output = Annotated[Path, typer.Option(help="A .png file or an existing folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Lightning = Annotated[int | None, typer.Option(help="4 or 8 steps, for weights or a LoRA of Lightning.")]
FreeModulation = Annotated[bool, typer.Option("--free-modulation", help="Free these weights once used.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the files only, one per line.")]
FromImage = Annotated[Path | None, typer.Option(help="Repeat this picture; options given here win.")]
Lora = Annotated[
    list[str] | None, typer.Option(help="A LoRA: its file, folder or hub name (owner/name/file.safetensors), =WEIGHT.")
]


def torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def device_name(name: str) -> str:
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


def model_class(name: str) -> tuple[Path, str]:
    """The folder of a pipeline with only its index for certain, and the class that the index names."""
    with failing(FAILED, ConnectionError, PermissionError), failing(BAD_INPUT, FileNotFoundError, NotADirectoryError):
        folder = resolve_folder(name, allow_patterns=["model_index.json"])
    if not (folder / "model_index.json").is_file():
        raise CommandError(f"{name} is not a pipeline's folder: it has no model_index.json")
    return folder, str(read_json(folder / "model_index.json").get("_class_name"))


def parameters(context: typer.Context, defaults: dict[str, Any], from_image: Path | None) -> dict[str, Any]:
    """What a picture is made with: defaults, the picture to repeat, presets of Lightning and, above all, what is given.

    A field of the picture that this version does not know is left out; a flag that is off is not given.
    """
    given = {}
    for name, value in context.params.items():
        if name in defaults and not (value is None or value is False or value in ([], ())):
            value = list(map(str, value)) if isinstance(value, (list, tuple)) else value
            given[name] = str(value) if isinstance(value, Path) else value
    stored = {}
    if from_image is not None:
        with failing(BAD_INPUT, ValueError, OSError):
            found = png_metadata.read_parameters(from_image)
        if (command := found.get("command", "generate")) != context.info_name:
            again = f"qwen-image-fast {command} --from-image {from_image}"
            raise CommandError(f"{from_image} was made by `{command}`: `{again}` repeats it")
        stored = {name: found[name] for name in defaults if name in found}
    presets = {"steps": given["lightning"], "cfg": 1.0} if "lightning" in given else {}
    return {"command": context.info_name, **defaults, **stored, **presets, **given}


def load_pipeline(cls: Any, chosen: dict[str, Any], free_modulation: bool, **parts):
    """A pipeline of the model in `chosen`, on its device and in its dtype, with LoRAs and the Lightning schedule."""
    models = {"torch_dtype": torch_dtype(chosen["dtype"]), "device": chosen["device"]}
    pipe = cls.from_pretrained(chosen["model"], **models, free_modulation_weights=free_modulation, **parts)
    weights = {}
    with failing(BAD_INPUT, ValueError, FileNotFoundError):
        for text in chosen["lora"] or []:
            source, weight = _lora(text)
            weights[pipe.load_lora_weights(source)] = weight
        if weights:
            pipe.set_adapters(list(weights), list(weights.values()))
    if chosen["lightning"] is not None:
        pipe.use_schedule(f"lightning-{chosen['lightning']}")
    return pipe


def _lora(text: str) -> tuple[str, float]:
    """The source and the weight of "style.safetensors=0.8"; a name may hold an = itself."""
    source, _, weight = text.rpartition("=")
    try:
        return source or text, float(weight) if source else 1.0
    except ValueError:
        return text, 1.0


def settle(chosen: dict[str, Any], device: str) -> None:
    """Check what all commands have, and put the device and the dtype in."""
    if chosen["lightning"] not in (None, 4, 8):
        raise CommandError(f"--lightning must be 4 or 8, got {chosen['lightning']}")
    if not math.isfinite(chosen["cfg"]):
        raise CommandError(f"--cfg must be a finite number, got {chosen['cfg']}")
    chosen["device"] = device_name(device)
    if chosen["dtype"] == "auto":
        chosen["dtype"] = "float32" if chosen["device"] == "cpu" else "bfloat16"
    torch_dtype(chosen["dtype"])


def check_prompt(prompt: str | None, others: str) -> None:
    if prompt is None:
        raise CommandError(f"nothing to make: give a prompt{others} or --from-image")
    if not prompt.strip():
        raise CommandError("the prompt is empty")


def check_size(width: int, height: int) -> tuple[int, int]:
    """Sides of text to image."""
    if bad := [side for side in (width, height) if side < 16 or side % 16]:
        near = "x".join(str(max(16, round(side / 16) * 16)) for side in (width, height))
        raise CommandError(f"width and height must be multiples of 16, got {bad[0]} in {width}x{height}; try {near}")
    return width, height


def size_of(text: str) -> tuple[int, int] | None:
    """Width and height of "640x480"; None: it is something else."""
    match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    return (int(match[1]), int(match[2])) if match else None


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def print_made(made: list[dict[str, Any]], seconds: dict[str, float]) -> None:
    for m in made:
        out.print(f"[green]{_plain(m['file'])}[/green]  seed {m['seed']}", soft_wrap=True, highlight=False)
    table = Table("stage")
    table.add_column("seconds", justify="right")
    for stage, spent in seconds.items():
        table.add_row(stage, f"{spent:.2f}")
    out.print(table)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def report_made(
    made: list[dict[str, Any]], chosen: dict[str, Any], seconds: dict[str, float], quiet: bool, as_json: bool
) -> None:
    """Say what was written: as JSON, as a list of files, or with the seconds of every stage."""
    if as_json:
        files_and_seeds = {"files": [m["file"] for m in made], "seeds": [m["seed"] for m in made]}
        common = {name: value for name, value in chosen.items() if name not in ("prompt", "seed")}
        print_json({**files_and_seeds, "images": made, "parameters": common, "seconds": seconds})
    elif not quiet:
        print_made(made, seconds)
