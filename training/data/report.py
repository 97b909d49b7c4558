"""The report of a filtering run: one HTML page that needs nothing beside it.

Read from what `data filter` leaves: audit.parquet in batches, examples.parquet, recipe.json and the shards. Plots are
matplotlib's SVG, pictures small JPEGs, both inside the page.
"""

from __future__ import annotations

import base64
import collections
import io
import json
import math
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write
from qwen_image_fast.training.recipe.fields import convert

from .examples import thumbnail
from .filters.order import DUPLICATES, FILTER_NAMES, FILTERS, STAGE_OF
from .judge import limits
from .recipe import FilterRecipe
from .record import Record
from .records_page import write_records
from .timeline import read_timeline

with needed_for("the report of a data set"):
    import pyarrow.parquet as pq

RATIOS = {"1:3": 1 / 3, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0, "4:3": 4 / 3, "3:2": 3 / 2,
          "16:9": 16 / 9, "3:1": 3.0}  # fmt: skip
STAGES = ("curation", "quality", "alignment", "text", "refinement", "portrait", "taxonomy")
_BINS, _PAIRS = 48, 8
_ROWS_NAMED = 40  # of the timeline; of more, some
_KEPT, _GONE, _LINE = "#3b7dd8", "#d9703b", "#222222"
_COPY_OF = re.compile(r"^(?:it looks like|the file is the same as) (.*?)(?:: \d+ of 64 bits differ)?$")


@dataclass
class Summary:
    """What one pass over the audit gives.

    Attributes:
        seen, kept: records. lost: by filter.
        histograms: by filter, (edges, counts of those it let pass, of those it rejected).
        balance: by what ("category", "language", "aspect"), counts (before, after).
        pairs: (filter, origin, origin of the better one, reason).
        unmeasured: filters that gave no record a score and rejected none.
    """

    seen: int = 0
    kept: int = 0
    lost: collections.Counter[str] = field(default_factory=collections.Counter)
    histograms: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)
    balance: dict[str, tuple[collections.Counter[str], collections.Counter[str]]] = field(default_factory=dict)
    pairs: list[tuple[str, str, str, str]] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a run of `data filter`, `records.html` beside it, and return its path.

    Raises:
        FileNotFoundError: the folder has no audit.parquet, examples.parquet or recipe.json.
    """
    folder = Path(folder)
    for name in ("audit.parquet", "examples.parquet", "recipe.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"report: {folder} must be the result of `qwen-image-fast data filter`, it has no {name}"
            )
    recipe = convert(json.loads((folder / "recipe.json").read_text(encoding="utf-8")), FilterRecipe, "")
    found = summarise(folder / "audit.parquet")
    page = _page(found, recipe, pq.read_table(folder / "examples.parquet").to_pylist(), folder)
    write_records(folder)
    atomic_write(folder / "report.html", lambda file: file.write(page.encode()))
    return folder / "report.html"


def summarise(audit: Path) -> Summary:
    """Two passes over the audit in batches; memory does not grow with its rows."""
    found = Summary()
    with pq.ParquetFile(audit) as table:
        scores = [name for name in FILTER_NAMES if name in table.schema_arrow.names]
        for name, (low, high) in _ranges(table, scores).items():
            edges = (
                np.geomspace(low, high, _BINS + 1) if low > 0 and high > 50 * low else np.linspace(low, high, _BINS + 1)
            )
            found.histograms[name] = edges, np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        for batch in table.iter_batches(batch_size=8192):
            filters = np.array(batch.column("filter").to_pylist(), object)
            for name, (edges, passed, gone) in found.histograms.items():
                values = batch.column(name).to_numpy(zero_copy_only=False)
                there = np.isfinite(values)
                for counts, which in ((passed, there & (filters != name)), (gone, there & (filters == name))):
                    # Clipped: the edges' last bits may differ from the extremes.
                    counts += np.histogram(np.clip(values[which], edges[0], edges[-1]), edges)[0]
            for row in batch.select(
                ["kept", "filter", "reason", "origin", "category", "text_language", "height", "width"]
            ).to_pylist():
                _count(found, row)
        silent = [name for name in scores if name not in found.histograms and not found.lost[name]]
        found.unmeasured = [name for name in silent if name not in DUPLICATES]  # far from each other, they have none
    return found


def _ranges(table: pq.ParquetFile, names: list[str]) -> dict[str, tuple[float, float]]:
    """(least, greatest) of every score that occurs, from the file's own statistics."""
    ranges: dict[str, tuple[float, float]] = {}
    place = {table.schema_arrow.names[i]: i for i in range(len(table.schema_arrow.names))}
    for group in range(table.num_row_groups):
        for name in names:
            known = table.metadata.row_group(group).column(place[name]).statistics
            if known is not None and known.has_min_max:
                low, high = ranges.get(name, (math.inf, -math.inf))
                ranges[name] = min(low, known.min), max(high, known.max)
    return {name: (low, high if high > low else low + 1) for name, (low, high) in ranges.items()}


def _count(found: Summary, row: dict[str, Any]) -> None:
    found.seen += 1
    found.kept += row["kept"]
    if row["filter"]:
        found.lost[row["filter"]] += 1
    traits = {"category": row["category"] or "unknown", "language": row["text_language"]}
    if row["height"]:
        wanted = math.log(row["width"] / row["height"])
        traits["aspect"] = min(RATIOS, key=lambda name: abs(math.log(RATIOS[name]) - wanted))
    for what, value in traits.items():
        if value is not None:
            before, after = found.balance.setdefault(what, (collections.Counter(), collections.Counter()))
            before[value] += 1
            after[value] += row["kept"]
    if len(found.pairs) < _PAIRS * 8 and row["filter"] in ("exact_duplicate", "near_duplicate"):
        earlier = _COPY_OF.sub(r"\1", row["reason"])
        found.pairs.append((row["filter"], row["origin"], earlier, row["reason"]))


def _page(found: Summary, recipe: FilterRecipe, examples: list[dict[str, Any]], folder: Path) -> str:
    share = found.kept / max(1, found.seen)
    parts = [
        f"<h1>Filtering report</h1><p class=lead><b>{found.seen:,}</b> records seen, <b>{found.kept:,}</b> kept "
        f"({share:.1%}), <b>{found.seen - found.kept:,}</b> rejected. Sources: "
        + ", ".join(escape(source.path) for source in recipe.sources)
        + ". <a href='records.html'>All records</a>, to search in.</p>",
        "<h2>Losses per stage</h2>", _stages_plot(found, recipe), _losses_table(found, recipe), "<h2>Scores</h2>",
        "<p>Every filter sees what those before it let pass. Examples are those nearest to the limit. The limits are "
        "the recipe's; the report of Qwen-Image prints none.</p>",
    ]  # fmt: skip
    bounds = limits(recipe)
    for name in FILTER_NAMES:
        shown = [one for one in examples if one["filter"] == name]
        if name in found.histograms or shown:
            parts.append(_filter_section(name, found, bounds.get(name, (None, None)), shown))
    parts += [
        "<h2>Balance before and after</h2>",
        *(_balance(found, what) for what in ("category", "language", "aspect")),
    ]
    parts += ["<h2>Duplicates</h2>", _duplicates(found, examples, folder, recipe), _timeline(folder)]
    frame = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    return frame.replace("@BODY@", "\n".join(parts))


def _losses_table(found: Summary, recipe: FilterRecipe) -> str:
    left, rows = found.seen, []
    for name in FILTER_NAMES:
        if STAGE_OF[name] in recipe.stages and name not in recipe.without:
            lost = found.lost[name]
            share = f"{lost / left if left else 0:.1%}"
            if name in found.unmeasured:  # no model, or nothing that it applies to
                share = "not measured"
            rows.append(f"<tr><td>{STAGE_OF[name]}<td>{name}<td>{left:,}<td>{lost:,}<td>{share}</tr>")
            left -= lost
    head = "<tr><th>stage<th>filter<th>came<th>went<th>share</tr>"
    return f"<details open><summary>By filter</summary><table>{head}{''.join(rows)}</table></details>"


def _stages_plot(found: Summary, recipe: FilterRecipe) -> str:
    steps = [(f"{n} {STAGES[n - 1]}", [f.name for f in FILTERS if f.stage == n]) for n in sorted(recipe.stages)]
    steps += [("1 duplicates", [*DUPLICATES]), ("6, 7 balance", ["category_balance", "taxonomy"])]
    left, came = found.seen, []
    for title, names in steps:
        if names:
            lost = sum(found.lost[name] for name in names)
            came.append((title, left, lost))
            left -= lost

    def draw(axes: Any) -> None:
        names = [title for title, _, _ in came]
        axes.barh(names, [all_ - lost for _, all_, lost in came], color=_KEPT, label="kept")
        axes.barh(names, [lost for _, _, lost in came], left=[a - b for _, a, b in came], color=_GONE, label="rejected")
        for place, (_, all_, lost) in enumerate(came):
            axes.text(all_, place, f" −{lost:,}", va="center")
        axes.invert_yaxis()
        axes.set_xlabel("records")
        axes.margins(x=0.12)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    return _plot(draw, (8, 0.45 * len(came) + 1.2), "Records that came to each stage, kept and rejected")


def _filter_section(
    name: str, found: Summary, bounds: tuple[float | None, float | None], examples: list[dict[str, Any]]
) -> str:
    parts = [f"<section><h3>{name}<small>stage {STAGE_OF[name]}, {found.lost[name]:,} rejected</small></h3>"]
    if name in found.histograms:
        edges, passed, gone = found.histograms[name]

        def draw(axes: Any) -> None:
            middles, widths = edges[:-1], np.diff(edges)
            axes.bar(middles, passed, widths, align="edge", color=_KEPT, label="passed")
            axes.bar(middles, gone, widths, align="edge", color=_GONE, alpha=0.85, label="rejected here")
            for limit in bounds:
                if limit is not None and edges[0] <= limit <= edges[-1]:
                    axes.axvline(limit, color=_LINE, linestyle="--", linewidth=1.2, label=f"limit {limit:g}")
            if edges[0] > 0 and edges[-1] > 50 * edges[0]:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:,g}")
            axes.set_yscale("symlog", linthresh=10)
            axes.yaxis.set_major_formatter("{x:,.0f}")  # numbers of records, not powers
            axes.set_ylim(bottom=0)
            axes.set_xlabel(name)
            axes.set_ylabel("records")
            axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)

        outside = " and ".join(f"{limit:g}" for limit in bounds if limit is not None)
        parts.append(_plot(draw, (8, 2.3), f"Histogram of {name}; limits: {outside or 'none'}"))
    for passes, title in ((True, "passed, nearest to the limit"), (False, "rejected, nearest to the limit")):
        figures = [_figure(one) for one in examples if one["passes"] is passes]
        if figures:
            parts.append(f"<h4>{title}</h4><div class=row>{''.join(figures)}</div>")
    return "".join(parts) + "</section>"


def _figure(one: dict[str, Any]) -> str:
    score = "" if one["score"] is None else f"{one['score']:.4g}"
    reason = f"<br>{escape(one['reason'])}" if one["reason"] else ""
    return _picture(one["picture"], one["origin"], f"<b>{score}</b> {escape(one['origin'])}{reason}")


def _picture(jpeg: bytes, origin: str, caption: str) -> str:
    image = "<div class=none>no picture</div>"
    if jpeg:
        image = f'<img alt="{escape(origin)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
    return f"<figure title='{escape(origin, quote=True)}'>{image}<figcaption>{caption}</figcaption></figure>"


def _balance(found: Summary, what: str) -> str:
    if what not in found.balance:
        return f"<p>{what.capitalize()}: not measured in this run.</p>" if what == "language" else ""
    before, after = found.balance[what]
    names = (
        [name for name in RATIOS if before[name]] if what == "aspect" else [name for name, _ in before.most_common()]
    )

    def draw(axes: Any) -> None:
        places = np.arange(len(names))
        for shift, counts, color, label in ((-0.2, before, "#999999", "before"), (0.2, after, _KEPT, "after")):
            shares = [100 * counts[name] / max(1, counts.total()) for name in names]
            axes.bar(places + shift, shares, 0.38, color=color, label=label)
            for place, name in zip(places, names, strict=True):
                axes.text(place + shift, shares[place], f"{counts[name]:,}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(places, names)
        axes.set_ylabel("% of records")
        axes.set_title(f"{what} (width : height)" if what == "aspect" else what, loc="left", fontsize=10)
        axes.margins(y=0.15)
        axes.legend(frameon=False, fontsize=8)

    return _plot(draw, (8, 2.4), f"Shares by {what}, before and after")


def _duplicates(found: Summary, examples: list[dict[str, Any]], folder: Path, recipe: FilterRecipe) -> str:
    exact, near = found.lost["exact_duplicate"], found.lost["near_duplicate"]
    parts = [f"<p>{exact:,} exact duplicates (sha256) and {near:,} near duplicates (perceptual hash).</p>"]
    copies = {
        (one["filter"], one["origin"]): one["picture"]
        for one in examples
        if one["filter"] in ("exact_duplicate", "near_duplicate") and not one["passes"]
    }
    wanted = [pair for pair in found.pairs if (pair[0], pair[1]) in copies] or found.pairs
    wanted = wanted[:_PAIRS]
    first = _originals(folder, {pair[2] for pair in wanted}, recipe.curation.max_pixels)
    for name, origin, earlier, reason in wanted:
        left = _picture(first.get(earlier, b""), earlier, escape(f"first: {earlier}"))
        right = _picture(copies.get((name, origin), b""), origin, escape(f"{origin}: {reason}"))
        parts.append(f"<div class='row pair'>{left}{right}</div>")
    return "".join(parts)


def _timeline(folder: Path) -> str:
    """When each worker judged, where the run left it; else nothing."""
    rows = read_timeline(folder)
    if not rows:
        return ""
    step = -(-len(rows) // _ROWS_NAMED)

    def draw(axes: Any) -> None:
        for place, row in enumerate(rows):
            bars = [(start, max(end - start, 0.01)) for start, end, _ in row["spans"]]
            axes.broken_barh(bars, (place - 0.35, 0.7), color=_KEPT)
            if step == 1:
                count = sum(count for _, _, count in row["spans"])
                axes.annotate(f" {count:,}", (max(end for _, end, _ in row["spans"]), place), va="center", fontsize=8)
        axes.set_yticks(range(0, len(rows), step), [row["name"] for row in rows[::step]], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.margins(x=0.08)
        axes.set_xlabel("seconds since the first part was begun")

    about = (
        "<p>When each worker judged, with its records, and the exchanges that found the duplicates. A run that was "
        "killed and went on shows its last start.</p>"
    )
    size = 8, 0.3 * min(len(rows), _ROWS_NAMED) + 0.9
    return f"<h2>Timeline</h2>{about}{_plot(draw, size, 'Timeline of the workers')}"


def _originals(folder: Path, origins: set[str], max_pixels: int) -> dict[str, bytes]:
    """Small copies of records of the result, by origin; those that a later filter rejected are not there."""
    index, places = folder / "shards" / "index.parquet", {}
    if not origins or not index.is_file():
        return {}
    rows = pq.read_table(index, columns=["origin", "shard", "key"], filters=[("origin", "in", sorted(origins))])
    for row in rows.to_pylist():
        places.setdefault(row["shard"], {})[row["key"]] = row["origin"]
    found = {}
    for shard, keys in places.items():
        with tarfile.open(folder / "shards" / shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if key in keys and kind not in ("json", "txt") and (content := tar.extractfile(member)):
                    found[keys[key]] = thumbnail(Record(content.read()), max_pixels)
    return found


def _plot(draw: Callable[[Any], None], size: tuple[float, float], alt: str) -> str:
    with needed_for("the report"):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    # As an image, not inline: the marks that the drawings define would clash with each other's.
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class=plot alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'
