"""A page of a result: its numbers as a table and its failures as pictures, in one HTML file with nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from qwen_image_fast.files import atomic_write

_STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:74em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}th{background:#f2f2f2}
.failures{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:280px}
figure img{max-width:136px;height:auto;border:1px solid #ccc;margin-right:2px;vertical-align:top}
figcaption{font-size:12px;overflow-wrap:anywhere}.why{color:#a33}"""


@dataclass(frozen=True)
class Failure:
    """A picture that is not what was asked for: its prompt, what is wrong, and what to show, in order."""

    prompt: str
    why: str
    shown: tuple[np.ndarray | Image.Image | Path, ...]


def write_page(
    path: Path,
    title: str,
    told: Sequence[str],
    rows: Sequence[Sequence[str]],
    failures: Mapping[str, Iterable[Failure]],
    notes: Sequence[str] = (),
) -> None:
    """Write the page, whole or not at all.

    Args:
        told: lines above the table. rows: of the table, the first is its head. failures: by heading.
        notes: lines below the table.
    """
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"]
    parts += [f"<style>{_STYLE}</style><h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in told)]
    parts += ["<table>", _row(rows[0], "th"), *(_row(row, "td") for row in rows[1:]), "</table>"]
    parts += [f"<p>{escape(line)}</p>" for line in notes]
    for heading, some in failures.items():
        figures = [_figure(failure) for failure in some]
        if figures:
            parts += [f"<h2>{escape(heading)}</h2><div class=failures>", *figures, "</div>"]
    atomic_write(path, lambda file: file.write("\n".join(parts).encode()))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _row(cells: Sequence[str], tag: str) -> str:
    def cell(text: str) -> str:
        number = tag == "td" and text[:1].isdigit()
        return f"<{tag}{' class=number' if number else ''}>{escape(text)}</{tag}>"

    return f"<tr>{''.join(map(cell, cells))}</tr>"


def _figure(failure: Failure) -> str:
    images = "".join(f'<img src="{_data(one)}" alt="">' for one in failure.shown)
    told = f"{escape(failure.prompt)} <span class=why>→ {escape(failure.why)}</span>"
    return f"<figure>{images}<figcaption>{told}</figcaption></figure>"


def _data(picture: np.ndarray | Image.Image | Path) -> str:
    image = picture if isinstance(picture, Image.Image) else None
    if image is None:
        image = Image.open(picture) if isinstance(picture, Path) else Image.fromarray(picture)
    image = image.convert("RGB")
    image.thumbnail((384, 384))
    file = io.BytesIO()
    image.save(file, "PNG" if image.width <= 128 else "JPEG")
    kind = "png" if image.width <= 128 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
