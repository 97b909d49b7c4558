"""The page of all records of a run: search and choose among them, in a browser, from a folder, without a server.

`records.html` loads `records/00000.js` and so on, 1,000 rows each, one after the other; only 100 are in the page.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_image_fast.extras import needed_for
from qwen_image_fast.files import atomic_write

from .filters.order import FILTER_NAMES, SCORED

with needed_for("the report of a data set"):
    import pyarrow.parquet as pq

ROWS = 1_000
_SHOWN = ("origin", "category", "width", "height", "filter", "reason")


def write_records(folder: Path) -> Path:
    """Write `records.html` and `records/` from the folder's audit.parquet, and return the page's path."""
    rows = folder / "records"
    shutil.rmtree(rows, ignore_errors=True)
    rows.mkdir()
    filters, categories, pages = set[str](), set[str](), 0
    with pq.ParquetFile(folder / "audit.parquet") as table:
        scores = _measured(table)
        for some in _batches(table, [*_SHOWN, *scores]):
            filters |= {row["filter"] for row in some if row["filter"]}
            categories |= {row["category"] for row in some if row["category"]}
            values = [[row[name] for name in _SHOWN] + [_short(row[name]) for name in scores] for row in some]
            text = f"records({json.dumps(values, ensure_ascii=False, separators=(',', ':'))});\n"
            content = text.encode("utf-8", "replace")
            atomic_write(rows / f"{pages:05d}.js", lambda file, content=content: file.write(content))
            pages += 1
    about = {
        "pages": pages, "scores": scores, "filters": [name for name in FILTER_NAMES if name in filters],
        "categories": sorted(categories),
    }  # fmt: skip
    frame = (Path(__file__).parent / "records.html").read_text(encoding="utf-8")
    page = frame.replace("@ABOUT@", json.dumps(about).replace("<", "\\u003c")).encode()
    atomic_write(folder / "records.html", lambda file: file.write(page))
    return folder / "records.html"


def _measured(table: pq.ParquetFile) -> list[str]:
    """The scores that any record has."""
    there = set[str]()
    for group in range(table.num_row_groups):
        for name in SCORED:
            column = table.metadata.row_group(group).column(table.schema_arrow.names.index(name))
            if column.statistics is None or column.statistics.null_count < column.num_values:
                there.add(name)
    return [name for name in SCORED if name in there]


def _batches(table: pq.ParquetFile, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    for batch in table.iter_batches(batch_size=ROWS, columns=columns):
        yield batch.to_pylist()


def _short(score: float | None) -> float | None:
    return None if score is None else float(f"{score:.4g}")
