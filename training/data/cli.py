"""What the commands `data filter`, `data report` and `data annotate` do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path


def filter_command(recipe: Path, overrides: Sequence[str] | None, out: Path) -> None:
    """Filter a data set in the report's seven stages.

    OUT gets shards/, audit.parquet with every record's scores and reason, rejected.png with examples, and what
    `data report` reads: examples.parquet and recipe.json.
    """
    from tqdm import tqdm

    from qwen_image_fast.files import atomic_write, claimed

    from .contact_sheet import RejectedSheet
    from .examples import Examples
    from .filters.order import FILTER_NAMES
    from .judge import limits
    from .pipeline import run_filters
    from .recipe import read_filter_recipe

    chosen = read_filter_recipe(recipe, overrides or ())
    sheet = RejectedSheet(chosen.sheet, len(FILTER_NAMES), chosen.curation.max_pixels)
    examples = Examples(limits(chosen), 5, chosen.curation.max_pixels)
    with claimed(out, "audit.parquet"):
        with tqdm(unit="record", smoothing=0.1) as bar:
            result = run_filters(chosen, out, progress=bar.update, judged=examples.add, rejected=sheet.add)
        examples.write(out / "examples.parquet")
        settings = json.dumps(dataclasses.asdict(chosen), indent=2, ensure_ascii=False)
        atomic_write(out / "recipe.json", lambda file: file.write(settings.encode()))
        shown = sheet.write(out / "rejected.png")
    for name, count in result.rejected.items():
        print(f"{count:8} rejected by {name}")
    print(f"{result.kept:8} of {result.seen} kept")
    print(f"shards and audit.parquet are in {out}" + ("; see rejected.png" if shown else ""))


def annotate_command(recipe: Path, overrides: Sequence[str] | None, out: Path) -> None:
    """Annotate a data set; OUT gets shards/, audit.parquet and answers.sqlite, from which a stopped run goes on."""
    from tqdm import tqdm

    from qwen_image_fast.files import claimed

    from .annotate import annotate
    from .recipe import read_annotate_recipe

    chosen = read_annotate_recipe(recipe, overrides or ())
    with claimed(out), tqdm(unit="picture", smoothing=0.1) as bar:
        result = annotate(chosen, out, progress=bar.update)
    for reason, count in result.rejected.items():
        print(f"{count:8} rejected: {reason}")
    print(f"{result.annotated:8} of {result.seen} annotated, {result.repaired} of them after a repair")
    print(f"shards and audit.parquet are in {out}")
