"""The options of the commands that make pictures, from the description of a picture and from how it is made."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from qwen_image_fast.cli.common import JSON
from qwen_image_fast.model_defaults import Generation
from qwen_image_fast.request import KINDS, Request
from qwen_image_fast.request_fields import RATIOS, Lora, has_pictures, limits, plain_type

# What each command makes; of several kinds, the last that all its pictures are given for.
KINDS_OF = {
    "generate": ("text", "image_to_image", "inpaint"),
    "edit": ("edit",),
    "layers": ("layers",),
    "controlnet": ("controlnet",),
}
COMMAND_OF = {kind: command for command, kinds in KINDS_OF.items() for kind in kinds}
FLAGS = {"seed": "-s", "images": "-n", "width": "-W", "height": "-H", "exact": "--exact-size"}


@dataclass
class Run:
    """How pictures are made and where they go: what their description does not say."""

    from_image: Annotated[Path | None, typer.Option(help="Repeat this picture; options given here win.")] = None
    prompts_file: Annotated[Path | None, typer.Option(help="One prompt per line; # starts a comment line.")] = None
    batch: Annotated[int, typer.Option(min=1, help="Prompts computed together.")] = 1
    output: Annotated[str, typer.Option("--output", "-o", help="A .png file or a folder; `out/` is made.")] = "."
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False
    compare: Annotated[bool, typer.Option("--compare", help="Also write what went in and came out side by side.")] = (
        False
    )
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU, if we have kernels.")] = "auto"
    free_modulation: Annotated[bool, typer.Option("--free-modulation", help="Free these weights once used.")] = False
    memory: Annotated[
        str | None, typer.Option(help="What the process, or the GPU, may hold, as 20GB; what does not fit is streamed.")
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the files only, one per line.")] = False
    as_json: JSON = False


def command(name: str, sentence: str, work: Callable[[str, dict[str, Any], Run], None]) -> Callable[..., None]:
    """The function that typer makes a command of: its parameters are the fields of the command's kinds and of `Run`."""
    kinds = [KINDS[kind] for kind in KINDS_OF[name]]
    described = _described(kinds)
    hints = get_type_hints(Run, include_extras=True)
    left_out = {"prompts_file", "batch"} if name == "layers" else set()
    how = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name], default=f.default)
        for f in fields(Run)
        if f.name not in left_out
    ]

    def run(context: typer.Context, **values: Any) -> None:
        own = {parameter.name: values[parameter.name] for parameter in how}
        given = {n: v for n, v in values.items() if n not in own and not (v is None or v is False or v in ([], ()))}
        work(name, given, Run(**own))

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *described, *how]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = sentence
    return run


def _described(kinds: Sequence[type[Request]]) -> list[inspect.Parameter]:
    """A parameter for each field of these kinds, and one for the size."""
    found: dict[str, inspect.Parameter] = {}
    for cls in kinds:
        for name, field in cls.model_fields.items():
            if name != "kind" and name not in found:
                panel = None if cls is kinds[0] else f"With --{kinds[1].inputs[0]}"
                found[name] = _parameter(cls, name, field, panel)
    if "width" in found:
        ratios = f"WIDTHxHEIGHT, or {', '.join(RATIOS)}."
        found["size"] = _option("size", str | None, typer.Option(help=ratios))
    return [found.pop("image" if kinds[0] is KINDS["layers"] else "prompt"), *found.values()]


def _option(name: str, kind: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=None)


def _parameter(cls: type[Request], name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    kind, help_text = plain_type(field), str(field.description)
    if name == positional(cls):
        return _option(name, str | None, typer.Argument(help=help_text))
    if kind is bool:
        return _option(name, bool | None, typer.Option(flag(name), help=help_text))
    more: dict[str, Any] = {"show_default": _shown(name, field), "rich_help_panel": panel}
    if literals := get_args(kind) if get_origin(kind) is not list and not has_pictures(kind) else ():
        kind, more["metavar"] = type(literals[0]), "|".join(map(str, literals))
    elif kind in (int, float) and name != "seed":
        text, low, _ = limits(field)
        help_text = f"{help_text.removesuffix('.')} ({text})." if low is not None else help_text
    elif has_pictures(kind) or _is_list(kind):
        kind = list[str] if _is_list(kind) else str
    flags = [flag(name), *([FLAGS[name]] if len(FLAGS.get(name, "")) == 2 else [])]
    return _option(name, kind | None, typer.Option(*flags, help=help_text, **more))


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(_is_list(part) for part in get_args(kind))


def _shown(name: str, field: FieldInfo) -> str | bool:
    """The default as the help shows it."""
    if field.is_required() or field.default in (None, []):
        return False
    shown = "a space" if field.default == " " else str(field.default)
    return f"the model's, else {shown}" if name in Generation.model_fields else shown


def positional(cls: type[Request]) -> str:
    """The field that is given without an option."""
    return "image" if cls is KINDS["layers"] else "prompt"


def flag(name: str) -> str:
    """The option of a field."""
    return FLAGS[name] if FLAGS.get(name, "").startswith("--") else f"--{name.replace('_', '-')}"


def named(cls: type[Request], by_size: bool = False) -> Callable[[str], str]:
    """Names for `RequestError.named`; `by_size`: width and height are given in one option."""

    def name_of(name: str) -> str:
        if name == positional(cls):
            return "picture" if name == "image" else name
        return name if by_size and name in ("width", "height") else flag(name)

    return name_of


def command_line(request: Request) -> str:
    """The command that makes this picture again."""
    cls, words = type(request), ["qwen-image-fast", COMMAND_OF[request.kind]]
    values: dict[str, Any] = {n: getattr(request, n) for n in cls.model_fields if n not in ("kind", "images")}
    values |= {} if request.cfg > 1 else {"negative_prompt": None}
    values |= {name: None for name, other in cls.needs.items() if values[other] is None}
    first = _word(values.pop(positional(cls)))
    for name, value in values.items():
        field = cls.model_fields[name]
        if value is None or value is False or (value == field.default and name not in Generation.model_fields):
            continue
        if value is True:
            words += [flag(name)]
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [flag(name), _word(one)]
    words = [*words, "--", first] if first.startswith("-") else [*words[:2], first, *words[2:]]
    return shlex.join(words)


def _word(value: Any) -> str:
    if isinstance(value, Lora):
        return f"{value.name}={value.scale:g}" if value.scale != 1 or "=" in value.name else value.name
    return str(getattr(value, "path", value))


def kind_of(command: str, given: Mapping[str, Any]) -> str:
    """Which of a command's kinds is meant by what is given."""
    asked = [kind for kind in KINDS_OF[command] if any(name in given for name in KINDS[kind].inputs)]
    return max(asked or KINDS_OF[command][:1], key=lambda kind: sum(name in given for name in KINDS[kind].inputs))
