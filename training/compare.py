"""One HTML page of a run: its sample pictures over the steps, the loss, and the loss by noise level.

Read from what a run leaves: log.jsonl and samples/. It needs nothing beside it: pictures are inside, curves are SVG.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.engine.run_log import SAMPLES, SAMPLES_INDEX
from qwen_image_fast.training.recipe.fields import RecipeError

PAGE = "compare.html"
SMOOTH = 0.9  # of the thick line: an average over about ten log lines

Points = list[tuple[int, float]]


def compare(run: str | Path) -> Path:
    """Write `compare.html` into the folder of a run, and return its path.

    Raises:
        RecipeError: the folder has no log of a run.
    """
    run = Path(run).expanduser()
    log = _lines(run / "log.jsonl")
    if not log:
        raise RecipeError(f"compare: {run} must be the folder of a run, it has no log.jsonl")
    curves = curves_of(log)
    losses = {name: points for name, points in curves.items() if name in ("loss", "validation_loss")}
    training = {_noise(name): points for name, points in curves.items() if name.startswith("loss_noise_")}
    held_out = {_noise(name): points for name, points in curves.items() if re.match(r"validation_loss_\d", name)}
    body = [f"<h1>{escape(run.resolve().name)}</h1>", _samples(run)]
    for title, found in (
        ("Loss", losses), ("Loss of training by noise level", training), ("Held-out loss by noise level", held_out),
    ):  # fmt: skip
        if any(len(points) > 1 for points in found.values()):
            body += [f"<h2>{title}</h2>", _plot(title, found)]
    template = Path(__file__).with_name("compare.html").read_text(encoding="utf-8")
    page = template.replace("@BODY@", "\n".join(body)).replace("@TITLE@", escape(run.resolve().name))
    atomic_write(run / PAGE, lambda file: file.write(page.encode()))
    return run / PAGE


def curves_of(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Of each number of a log its values by step."""
    found: dict[str, Points] = defaultdict(list)
    for line in log:
        for name, value in line.items():
            if name != "step":
                found[name].append((line["step"], value))
    return dict(found)


def _noise(name: str) -> str:
    """The noise level in a number's name: `loss_noise_0.25_0.5` is 0.25 to 0.5."""
    return " to ".join(re.findall(r"\d[\d.]*", name))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _samples(run: Path) -> str:
    """A table: a row for each title, a column for each step."""
    rows: dict[tuple[int, str], dict[int, Path]] = defaultdict(dict)
    for line in _lines(run / SAMPLES / SAMPLES_INDEX):
        file = run / SAMPLES / line["file"]
        if file.is_file():
            rows[line["number"], line["title"]][line["step"]] = file
    if not rows:
        return "<p>No sample pictures: <code>log.sample_every</code> is 0.</p>"
    steps = sorted({step for pictures in rows.values() for step in pictures})
    head = "".join(f"<th>{'before' if step == 0 else f'step {step}'}</th>" for step in steps)
    lines = [f"<tr><th></th>{head}</tr>"]
    for (_, title), pictures in sorted(rows.items()):
        cells = "".join(f"<td>{_picture(pictures[s], title) if s in pictures else ''}</td>" for s in steps)
        lines.append(f"<tr><th>{escape(title)}</th>{cells}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _picture(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _plot(title: str, curves: Mapping[str, Points]) -> str:
    with needed_for("the page of a run"):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(sorted(curves.items())):
        steps, values = zip(*points)
        axes.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=f"C{number}", label=name)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class=plot alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'


def smoothed(values: Sequence[float]) -> list[float]:
    """A running average, s <- 0.9 s + 0.1 v, divided by the sum of its weights, so that it begins right."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = SMOOTH * total + (1 - SMOOTH) * value, SMOOTH * weight + (1 - SMOOTH)
        out.append(total / weight)
    return out
