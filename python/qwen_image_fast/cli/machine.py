"""`qwen-image-fast inspect`, `doctor` and `bench`: models, pictures and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_image_fast.cli.common import DTYPE_HELP, JSON, check_dtype, memory_bytes, print_json, torch_dtype
from qwen_image_fast.cli.errors import BAD_INPUT, FAILED, CommandError, failing, out, plain, print_error
from qwen_image_fast.cli.progress import Progress

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            help="A model's folder or hub name, of which only json files and headers are read; a file; a picture."
        ),
    ],
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="GB allowed for activations in the table of what fits.", show_default="3"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Also the plan under such a limit, as 20GB: what stays and what is streamed.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"With --memory: of the weights, {DTYPE_HELP}")] = "bfloat16",
    precision: Annotated[
        str | None, typer.Option(help="With --memory: int8 or int4, of the transformer's large layers.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say what a model holds and which cards it fits, or what a picture was made with and how to repeat it."""
    if precision is not None and memory is None:
        raise CommandError("--precision has no effect without --memory, under which it changes the plan")
    if precision not in (None, "int8", "int4"):
        raise CommandError(f"--precision must be int8 or int4, got {precision}")
    if (path := Path(what).expanduser()).suffix.lower() in PICTURES and not path.is_dir():
        if memory is not None:
            raise CommandError("--memory has no effect on a picture; name a model")
        from qwen_image_fast.cli.show import show

        show(path, as_json)
        return
    with (
        Progress(not as_json) as progress,
        failing(FAILED, ConnectionError, PermissionError),
        failing(BAD_INPUT, FileNotFoundError, NotADirectoryError, ValueError),
    ):
        progress.stage(f"read the headers of {what}")
        from qwen_image_fast import inspect_file, inspect_model

        if other := inspect_file.other_file(what):
            description = inspect_file.describe(other)
        else:
            limit = None if memory is None else memory_bytes(memory)
            found = inspect_model.inspect_model(what)
            plan = None if limit is None else found.plan(limit, torch_dtype(dtype), precision)
    if other:
        if memory is not None:
            raise CommandError("--memory has no effect on such a file; name a model")
        _show(description, as_json)
        return
    margin = inspect_model.MARGIN_GB if margin is None else margin
    if as_json:
        print_json(inspect_model.as_json(found, margin) | ({} if plan is None else {"plan": dict(plan.rows())}))
    else:
        out.print(inspect_model.render(found, margin))
        if plan is not None:
            out.print(inspect_model.plan_table(plan, dtype, precision))
    for problem in found.problems:
        print_error(problem)
    if found.problems:
        raise typer.Exit(FAILED)


def _show(described: dict[str, Any], as_json: bool) -> None:
    """What `inspect_file` found."""
    if as_json:
        print_json(described)
        return
    from qwen_image_fast.inspect_file import lines

    for name, value in lines(described):
        out.print(f"[bold]{name:14}[/bold] {plain(value)}", soft_wrap=True, highlight=False)


def doctor_command(as_json: JSON = False) -> None:
    """Show the environment, test every op, forward and backward, against its reference, and make a picture."""
    with Progress(not as_json) as progress:
        progress.stage("load torch")
        from qwen_image_fast import doctor, doctor_picture

        environment, old = doctor.environment(), doctor.too_old()
        progress.stage("test every op")
        verdicts = doctor.self_test()
        progress.stage("make a picture")
        drawn = doctor_picture.draw("cuda" if doctor.has_cuda_kernels() else "cpu")
    bad = [v for v in verdicts if v.problem]
    if as_json:
        print_json({"environment": environment, "too_old": old, "self_test": [vars(v) for v in verdicts],
                    "agree": not bad, "picture": vars(drawn)})  # fmt: skip
    else:
        out.print(doctor.environment_table(environment))
        out.print(doctor.verdict_table(verdicts))
    for v in bad:
        print_error(f"{v.op}, {v.kernels} kernels, {v.dtype}: {v.problem}")
    for sentence in old.values():
        print_error(sentence)
    if drawn.problem:
        print_error(f"no picture by the model of the package: {drawn.problem}")
    if bad or old or drawn.problem:
        raise typer.Exit(FAILED)
    if not as_json:
        out.print("[bold green]all kernels agree with their references[/bold green]")
        made = f"a picture of {drawn.side} x {drawn.side} in {drawn.seconds:.1f} s"
        out.print(f"{made}, {drawn.difference} of 255 from that of the references", style="bold green")


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the tokens, fewer repetitions.")] = False,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    width: Annotated[int, typer.Option(min=128, help="Of the small transformer, a multiple of 128.")] = 768,
    as_json: JSON = False,
) -> None:
    """Time the ops and a small transformer on this CPU against the reference path, in turn; medians."""
    if width % 128:
        raise CommandError(f"--width must be a multiple of 128, got {width}")
    check_dtype(dtype)
    with Progress(not as_json) as progress:
        progress.stage("load torch")
        import torch

        from qwen_image_fast import doctor

        tokens, repeats = (256, 3) if quick else (1024, 11)
        progress.stage("time the ops")
        timings = doctor.time_ops(tokens, 3072, torch_dtype(dtype), repeats)
        progress.stage("time the transformer")
        timings.append(doctor.time_transformer(tokens, width, torch_dtype(dtype), repeats))
    if as_json:
        print_json({"dtype": dtype, "tokens": tokens, "timings": [vars(t) for t in timings]})
        return
    title = f"{tokens} tokens, ops of width 3072, {dtype}, {torch.get_num_threads()} threads"
    out.print(doctor.timing_table(timings, title))
    out.print("GB/s: inputs and results counted once. The reference is plain PyTorch, not torch.compile.", style="dim")
