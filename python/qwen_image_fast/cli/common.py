"""What all commands share: devices, types, loading, printing. torch is imported only where a command needs it.

What was asked for is on standard output, with `--json` as one JSON object.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_image_fast.cli.errors import CommandError, out
from qwen_image_fast.sizes import parse_bytes

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_HELP = f"{', '.join(DTYPES)}."
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise CommandError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}")


def torch_dtype(name: str) -> torch.dtype:
    import torch

    check_dtype(name)
    return getattr(torch, name)


def memory_bytes(text: str) -> int:
    """Of --memory; ValueError for what is no size."""
    return parse_bytes(text, "--memory")


def check_device(name: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise CommandError(f"--device must be auto, cpu, cuda or cuda:1 and so on, got {name}")


def device_name(name: str) -> str:
    """What "auto" means here; CommandError for a GPU that cannot be used."""
    import torch

    from qwen_image_fast import doctor

    if name == "auto":
        return "cuda" if doctor.has_cuda_kernels() else "cpu"
    number = int(name.partition(":")[2] or 0)
    if name != "cpu" and (not doctor.has_cuda_kernels() or number >= torch.cuda.device_count()):
        why = "this build has no CUDA kernels" if torch.cuda.is_available() else "torch sees no GPU here"
        if doctor.has_cuda_kernels():
            why = f"torch sees {torch.cuda.device_count()} here, the first of which is cuda:0"
        raise CommandError(f"--device {name} cannot be used: {why}; `qwen-image-fast doctor` says more")
    return name


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def print_seconds(seconds: dict[str, float]) -> None:
    from rich.table import Table

    table = Table("stage")
    table.add_column("seconds", justify="right")
    for stage, spent in seconds.items():
        table.add_row(stage, f"{spent:.2f}")
    out.print(table)


def print_json(value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)  # JSON's own way to write what the output's encoding lacks
    print(text)


def report_made(
    made: list[dict[str, Any]], chosen: dict[str, Any], seconds: dict[str, float], quiet: bool, as_json: bool
) -> None:
    """Say what was written, of which the files are named already: as JSON, or the seconds of every stage."""
    if as_json:
        files_and_seeds = {"files": [m["file"] for m in made], "seeds": [m["seed"] for m in made]}
        common = {name: value for name, value in chosen.items() if name not in ("prompt", "seed")}
        print_json({**files_and_seeds, "images": made, "parameters": common, "seconds": seconds})
    elif not quiet:
        print_seconds(seconds)
