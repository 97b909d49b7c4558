"""What the commands `data filter`, `data annotate` and `data retrieve` do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .pipeline import Result
    from .recipe import FilterRecipe
    from .record import Record

_EXAMPLES = 3


def filter_command(
    recipe: Path,
    overrides: Sequence[str] | None,
    out: Path,
    workers: int = 1,
    preset: str = "",
    dry_run: bool = False,
    engine: str = "local",
) -> None:
    """Filter a data set in the report's seven stages.

    OUT gets shards/, audit.parquet with every record's scores and reason, rejected.png with examples, and what
    `data report` reads: examples.parquet and recipe.json. With `dry_run`, what would go is printed, and nothing is
    written.
    """
    from .engine import engine_of
    from .recipe import preset_recipe, read_filter_recipe
    from .without_effect import of_filters, of_sources

    chosen = read_filter_recipe(recipe, overrides or (), preset)
    _say(of_filters(chosen, preset_recipe(preset), engine=engine), of_sources(chosen.sources))
    if not dry_run:
        _check_apart(chosen, out)
    carrier = engine_of(engine, chosen)
    try:
        _filter(chosen, out, workers, carrier) if not dry_run else _try(chosen, workers, carrier)
    finally:
        carrier.close()


def _check_apart(chosen: FilterRecipe, out: Path) -> None:
    """ValueError where the result lies in a source, which would have its rejected.png the next time."""
    there = out.expanduser().resolve()
    for source in chosen.sources:
        folder = Path(source.path).expanduser()
        if folder.is_dir() and there.is_relative_to(folder.resolve()):
            raise ValueError(
                f"filter: --out must not be inside of the data, got {out} in {source.path}: its rejected.png would be "
                "taken for data the next time; name another folder"
            )


def _filter(chosen: FilterRecipe, out: Path, workers: int, engine: Engine) -> None:
    from tqdm import tqdm

    from qwen_image_fast.files import atomic_write, claimed

    from .contact_sheet import RejectedSheet
    from .examples import Examples
    from .filters.order import FILTER_NAMES
    from .judge import limits
    from .pipeline import run_filters

    sheet = RejectedSheet(chosen.sheet, len(FILTER_NAMES), chosen.curation.max_pixels)
    examples = Examples(limits(chosen), 5, chosen.curation.max_pixels)
    settings = json.dumps(dataclasses.asdict(chosen), indent=2, ensure_ascii=False).encode()

    def judged(record: Record, row: dict[str, Any]) -> None:
        examples.add(record, row)
        if not row["kept"]:
            sheet.add(record, row)

    def beside(folder: Path) -> None:
        examples.write(folder / "examples.parquet")
        atomic_write(folder / "recipe.json", lambda file: file.write(settings))
        sheet.write(folder / "rejected.png")
        if engine.timeline is not None:
            engine.timeline.write(folder)

    with claimed(out, "audit.parquet"), tqdm(unit="record", smoothing=0.1) as bar:
        progress = _shown_by(bar)
        result = run_filters(
            chosen, out, engine=engine, workers=workers, progress=progress, judged=judged, beside=beside
        )
    _print(result)
    shown = (out / "rejected.png").exists()
    print(f"shards and audit.parquet are in {out}" + ("; see rejected.png" if shown else ""))


def _try(recipe: FilterRecipe, workers: int, engine: Engine) -> None:
    from tqdm import tqdm

    from .pipeline import try_filters

    examples: dict[str, list[str]] = {}

    def heard(row: dict[str, Any]) -> None:
        if not row["kept"]:
            some = examples.setdefault(row["filter"], [])
            if len(some) < _EXAMPLES:
                some.append(f"{row['origin']}: {row['reason']}")

    with tqdm(unit="record", smoothing=0.1) as bar:
        result = try_filters(recipe, engine=engine, workers=workers, progress=_shown_by(bar), heard=heard)
    _print(result, examples)
    print("a dry run: nothing is written")


def _say(*sentences: Iterable[str]) -> None:
    for sentence in itertools.chain(*sentences):
        print(f"recipe: {sentence}", file=sys.stderr)


def _shown_by(bar: Any) -> Callable[[int, int], None]:
    def progress(count: int, total: int) -> None:
        bar.total = total
        bar.update(count)

    return progress


def _print(result: Result, examples: Mapping[str, Sequence[str]] = {}) -> None:
    for name, count in result.rejected.items():
        print(f"{count:8} rejected by {name}")
        for one in examples.get(name, ()):
            print(f"           {one}")
    if result.unmeasured:
        print(f"not measured, for want of a model or of records that they are for: {', '.join(result.unmeasured)}")
    print(f"{result.kept:8} of {result.seen} kept")


def annotate_command(recipe: Path, overrides: Sequence[str] | None, out: Path, pilot: int | None = None) -> None:
    """Annotate a data set; OUT gets shards/, audit.parquet and answers.sqlite, from which a stopped run goes on.

    Args:
        pilot: so many records alone, and pilot.html.

    Raises:
        RuntimeError: the endpoint failed for some pictures, which another run asks about again.
    """
    from tqdm import tqdm

    from qwen_image_fast.files import claimed

    from .annotate import annotate
    from .parts import plan
    from .recipe import read_annotate_recipe
    from .without_effect import of_annotation, of_sources

    chosen = read_annotate_recipe(recipe, overrides or ())
    _say(of_annotation(chosen), of_sources(chosen.sources))
    with claimed(out):
        total = sum(part.count for part in plan(chosen.sources))
        total = total if pilot is None else min(total, pilot)
        with tqdm(unit="picture", total=total, smoothing=0.1) as bar:
            result = annotate(chosen, out, progress=bar.update, pilot=pilot)
    for reason, count in result.rejected.items():
        print(f"{count:8} rejected: {reason}")
    print(f"{result.annotated:8} of {result.seen} annotated, {result.repaired} of them after a repair")
    if result.beside or result.had_caption:
        print(
            f"{result.beside:8} captions are beside their pictures; {result.had_caption} pictures had one and keep it"
        )
    written = "shards and audit.parquet are" if pilot is None else "pilot.html is"
    print(f"{written} in {out}")
    if result.unanswered:
        raise RuntimeError(
            f"annotate: the endpoint failed for {result.unanswered} of {result.seen} pictures, which the result lacks; "
            "run the same command again to ask for them"
        )


def retrieve_command(recipe: Path, overrides: Sequence[str] | None, out: Path) -> None:
    """Fill gaps of a taxonomy from a pool; OUT gets shards/ and audit.parquet, and keeps the vectors of the pool, from
    which a stopped run goes on and another search begins."""
    from tqdm import tqdm

    from qwen_image_fast.files import claimed

    from .embed import check_model
    from .recipe import read_retrieve_recipe
    from .retrieve import check_index, retrieve
    from .without_effect import of_retrieval, of_sources

    chosen = read_retrieve_recipe(recipe, overrides or ())
    _say(of_retrieval(chosen), of_sources(chosen.sources))
    check_index()
    check_model(chosen)
    with claimed(out), tqdm(unit="record", smoothing=0.1) as bar:
        filled = retrieve(chosen, out, progress=_shown_by(bar))
    for one in filled:
        near = "" if one.least is None else f", cosines {one.most:.3f} to {one.least:.3f}"
        print(f"{one.node}: {one.there} there, {one.taken} found of {max(0, one.count - one.there)} missing{near}")
    print(f"shards and audit.parquet are in {out}")
