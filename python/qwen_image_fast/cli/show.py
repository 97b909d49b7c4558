"""`qwen-image-fast inspect PICTURE`: what a picture was made with, and the command that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_image_fast.cli.common import print_json
from qwen_image_fast.cli.errors import BAD_INPUT, CommandError, failing, out, plain
from qwen_image_fast.cli.options import COMMAND_OF, command_line
from qwen_image_fast.folders import nearest_file
from qwen_image_fast.png_metadata import read_parameters, read_request


def show(path: Path, as_json: bool) -> None:
    """Print the parameters in a PNG."""
    if not path.exists():
        raise CommandError(f"there is no picture {path}{nearest_file(path)}")
    with failing(BAD_INPUT, ValueError, OSError):
        found, (request, _, unknown) = read_parameters(path), read_request(path)
    command = command_line(request)
    if as_json:
        print_json({**found, "command_line": command})
        return
    for name, value in sorted((n, v) for n, v in found.items() if v not in (None, [], False)):
        left = "  (of a later version)" if name in unknown else ""
        out.print(f"[bold]{name:20}[/bold] {plain(_text(value))}{left}", soft_wrap=True, highlight=False)
    out.print(
        f"\nThe same again: qwen-image-fast {COMMAND_OF[request.kind]} --from-image {plain(path)}", soft_wrap=True
    )
    out.print(f"In full: {plain(command)}", soft_wrap=True, highlight=False)


def _text(value: Any) -> str:
    """Pictures by their paths, LoRAs with their weights."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return str(value["path"]) if "path" in value else f"{value.get('name')} x {value.get('scale')}"
    return ("a space" if value == " " else repr(value)) if str(value).isspace() else str(value)
