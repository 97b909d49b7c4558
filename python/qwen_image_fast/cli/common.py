"""What all commands share: devices, types, loading, printing. torch is imported only where a command needs it.

What was asked for is on standard output, with `--json` as one JSON object.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_image_fast.cli.errors import BAD_INPUT, FAILED, CommandError, failing, out, plain

if TYPE_CHECKING:
    import torch

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
DTYPES = ("float32", "bfloat16", "float16")


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


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}")


def torch_dtype(name: str) -> torch.dtype:
    import torch

    check_dtype(name)
    return getattr(torch, name)


def device_name(name: str) -> str:
    import torch

    from qwen_image_fast import doctor

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
    from qwen_image_fast.folders import read_json, resolve_folder

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
        from qwen_image_fast import png_metadata

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
    if chosen["dtype"] != "auto":
        check_dtype(chosen["dtype"])
    chosen["device"] = device_name(device)
    if chosen["dtype"] == "auto":
        chosen["dtype"] = "float32" if chosen["device"] == "cpu" else "bfloat16"


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
    from rich.table import Table

    for m in made:
        out.print(f"[green]{plain(m['file'])}[/green]  seed {m['seed']}", soft_wrap=True, highlight=False)
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
