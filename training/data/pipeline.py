"""The seven stages in order: sources in, shards and an audit of every record out."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_image_fast.files import atomic_write

from .collect import collect
from .disk import full_disk_is_a_sentence
from .filters import captions, curation, duplicates, portrait, quality, refinement, text
from .filters.balance import Balance
from .filters.base import Filter
from .filters.order import FILTER_NAMES, FILTERS, STAGE_OF
from .filters.picture import Picture
from .recipe import FilterRecipe
from .record import Record
from .shards import write_shards

AUDIT = pa.schema(
    [
        ("id", pa.string()), ("origin", pa.string()), ("source", pa.string()), ("category", pa.string()),
        ("height", pa.int32()), ("width", pa.int32()), ("text_language", pa.string()), ("kept", pa.bool_()),
        ("stage", pa.int8()), ("filter", pa.string()), ("reason", pa.string()),
        *((f.name, pa.float64()) for f in FILTERS),
    ]
)  # fmt: skip
_AUDIT_ROWS = 4096


@dataclass(frozen=True)
class Result:
    """seen, kept: records. rejected: how many went by each filter, in the order of the stages."""

    seen: int
    kept: int
    rejected: dict[str, int]


def limits(recipe: FilterRecipe) -> dict[str, tuple[float | None, float | None]]:
    """(low, high) of every filter that judges one record at a time; None: no limit."""
    first, look, words, last = recipe.curation, recipe.quality, recipe.captions, recipe.refinement
    found: dict[str, tuple[float | None, float | None]] = {
        "file_size": (first.min_bytes, first.max_bytes), "resolution": (first.min_side, None),
        "aspect_ratio": (None, first.max_aspect), "near_duplicate": (first.duplicate_bits, None),
        "nsfw": (None, first.max_nsfw),
        "clarity": (look.min_clarity, None), "luma": (look.min_luma, look.max_luma),
        "saturation": (None, look.max_saturation), "rgb_entropy": (look.min_entropy, None),
        "texture": (None, look.max_texture),
        "token_length": (words.min_tokens, words.max_tokens), "invalid_caption": (words.min_new_words, None),
        "alignment": (words.min_alignment, None),
        "intensive_text": (None, recipe.text.max_area), "small_characters": (recipe.text.min_height, None),
        "refined_resolution": (last.min_side, None), "image_quality": (None, last.max_blockiness),
        "aesthetic": (0.0, None), "border": (None, last.max_border), "watermark": (None, last.max_watermark),
        "face_mosaic": (None, recipe.balance.max_mosaic),
    }  # fmt: skip
    return {f.name: found.get(f.name, (None, None)) for f in FILTERS}


def build_filters(
    recipe: FilterRecipe,
    folder: Path,
    *,
    reader: text.TextReader | None = None,
    aesthetic: captions.Scorer | None = None,
    alignment: captions.Scorer | None = None,
) -> list[Filter]:
    """The filters of a recipe's stages, in order; those that judge one record at a time.

    Args:
        folder: for the indices of duplicates.
        reader: of text, for stage 4; None: `evaluation.ocr.Reader`.
        aesthetic: for stage 5; None: that filter is left out.
        alignment: for stage 3, of all captions; None: the models of the recipe, or left out where it names none.

    Raises:
        ImportError, FileNotFoundError: a filter lacks its package or its model; the sentence says what to do.
    """
    bounds, words = limits(recipe), recipe.captions

    def aligned() -> Filter | None:
        scorers = [alignment or captions.clip_scorer(path) for path in (words.chinese_clip, words.siglip)]
        return captions.Alignment(words.min_alignment, *scorers) if any(scorers) else None

    def read() -> Filter:
        from ..evaluation.ocr import Reader

        return text.LanguageSplit(reader or Reader())

    make: dict[str, Callable[[], Filter | None]] = {
        "broken_file": lambda: curation.BrokenFile(),
        "file_size": lambda: curation.FileSize(*bounds["file_size"]),
        "resolution": lambda: curation.Resolution(*bounds["resolution"]),
        "aspect_ratio": lambda: curation.AspectRatio(*bounds["aspect_ratio"]),
        "exact_duplicate": lambda: duplicates.ExactDuplicate(folder),
        "near_duplicate": lambda: duplicates.NearDuplicate(
            folder, recipe.curation.duplicate_bits, recipe.quality.min_entropy
        ),
        "nsfw": lambda: curation.Nsfw(recipe.curation.max_nsfw),
        "rotation": lambda: quality.Rotation(),
        "clarity": lambda: quality.Clarity(*bounds["clarity"]),
        "luma": lambda: quality.Luma(*bounds["luma"]),
        "saturation": lambda: quality.Saturation(*bounds["saturation"]),
        "rgb_entropy": lambda: quality.RgbEntropy(*bounds["rgb_entropy"]),
        "texture": lambda: quality.Texture(*bounds["texture"]),
        "token_length": lambda: captions.TokenLength(words.min_tokens, words.max_tokens, words.tokenizer),
        "invalid_caption": lambda: captions.InvalidCaption(words.min_new_words),
        "alignment": aligned,
        "language_split": read,
        "intensive_text": lambda: text.IntensiveText(*bounds["intensive_text"]),
        "small_characters": lambda: text.SmallCharacters(*bounds["small_characters"]),
        "refined_resolution": lambda: refinement.RefinedResolution(*bounds["refined_resolution"]),
        "image_quality": lambda: refinement.ImageQuality(*bounds["image_quality"]),
        "aesthetic": lambda: refinement.Aesthetic(0.0, aesthetic) if aesthetic else None,
        "codes": lambda: refinement.Codes(),
        "border": lambda: refinement.Border(*bounds["border"]),
        "watermark": lambda: refinement.Watermark(*bounds["watermark"]),
        "abnormal_element": lambda: refinement.AbnormalElement(),
        "face_mosaic": lambda: portrait.FaceMosaic(*bounds["face_mosaic"]),
    }
    wanted = [f.name for f in FILTERS if f.stage in recipe.stages and f.name not in recipe.without]
    return [made for name in wanted if (made := make[name]())]


def judge(record: Record, filters: Iterable[Filter], max_pixels: int) -> tuple[Record, dict[str, Any]]:
    """The record, with what the filters found in its metadata, and its row of the audit.

    Filters run in order until one rejects; the scores of those after it are missing from the row. Of the stages 2 and
    3, records of the category Synthetic, whose text was drawn and whose caption is known, see none.
    """
    picture = Picture(record, max_pixels)
    row: dict[str, Any] = {
        "id": record.id, "origin": record.origin, "source": record.source, "category": record.category, "kept": True,
    }  # fmt: skip
    for one in filters:
        if one.stage in (2, 3) and record.category == "Synthetic":
            continue
        verdict = one.judge(picture)
        row[one.name] = verdict.score
        if verdict.reason is not None:
            row.update(_rejection(one.name, verdict.reason))
            break
    if row.get("broken_file"):
        row["height"], row["width"] = picture.size
    row.update(picture.tags)
    if picture.tags:
        record = dataclasses.replace(record, metadata={**record.metadata, **picture.tags})
    return record, row


def run_filters(
    recipe: FilterRecipe,
    out: str | Path,
    *,
    filters: Callable[[FilterRecipe, Path], list[Filter]] = build_filters,
    progress: Callable[[], Any] = lambda: None,
    judged: Callable[[Record, dict[str, Any]], Any] = lambda record, row: None,
    rejected: Callable[[Record, dict[str, Any]], Any] = lambda record, row: None,
) -> Result:
    """Write what passes to `out/shards` (see `shards.write_shards`) and every record's fate to `out/audit.parquet`.

    Records that pass the filters are kept in `out` until the balance of stages 6 and 7 has seen them all, so the disk
    holds them twice for a while. Memory does not grow with their number. The same recipe gives the same bytes.

    Args:
        filters: makes the filters; a function of your own can add models to `build_filters`.
        progress: called after each record.
        judged: called with each record and its row of the audit, before the balance of stages 6 and 7.
        rejected: called with each record that goes, and its row.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    balance = recipe.balance
    by_category = 6 in recipe.stages and "category_balance" not in recipe.without and bool(balance.categories)
    by_node = 7 in recipe.stages and "taxonomy" not in recipe.without and balance.power < 1
    with full_disk_is_a_sentence(out), tempfile.TemporaryDirectory(prefix=".filtering-", dir=out) as name:
        work = Path(name)
        table = Balance(work, balance.categories, balance.tail, balance.power, recipe.seed)
        chain = filters(recipe, work)
        first_audit = work / "audit.parquet"

        def first_pass(write_row: Callable[[dict[str, Any]], None]) -> Iterator[Record]:
            number = itertools.count()
            for source in recipe.sources:
                for found in collect(**dataclasses.asdict(source)):
                    record, row = judge(found, chain, recipe.curation.max_pixels)
                    write_row(row)
                    judged(record, row)
                    if row["kept"]:
                        table.add(next(number), record, row.get(balance.best_by))
                        yield record
                    else:
                        rejected(record, row)
                    progress()

        atomic_write(first_audit, lambda file: _audited(file, first_pass, work / "kept", recipe.shard_records))
        counts: collections.Counter[str] = collections.Counter()

        def second_pass(write_row: Callable[[dict[str, Any]], None]) -> Iterator[Record]:
            reasons, kept = table.reasons(by_category, by_node), _kept(work / "kept")
            for row in _rows(first_audit):
                record = dataclasses.replace(next(kept), origin=row["origin"]) if row["kept"] else None
                if record is not None and (reason := next(reasons)):
                    row.update(_rejection(*reason))
                    rejected(record, row)
                counts[row["filter"] or ""] += 1
                write_row(row)
                if record is not None and row["kept"]:
                    yield record

        atomic_write(
            out / "audit.parquet", lambda file: _audited(file, second_pass, out / "shards", recipe.shard_records)
        )
    ordered = {name: counts[name] for name in FILTER_NAMES if counts[name]}
    return Result(sum(counts.values()), counts[""], ordered)


def _rejection(name: str, reason: str) -> dict[str, Any]:
    return {"kept": False, "stage": STAGE_OF[name], "filter": name, "reason": reason}


def _audited(
    file: BinaryIO,
    records: Callable[[Callable[[dict[str, Any]], None]], Iterator[Record]],
    folder: Path,
    shard_records: int,
) -> None:
    """Write shards of records, and to `file` the audit rows that making them hands to its argument."""
    with pq.ParquetWriter(file, AUDIT) as audit:
        rows: list[dict[str, Any]] = []

        def write_row(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == _AUDIT_ROWS:
                audit.write_table(pa.Table.from_pylist(rows, AUDIT))
                rows.clear()

        write_shards(records(write_row), folder, shard_records=shard_records)
        audit.write_table(pa.Table.from_pylist(rows, AUDIT))


def _rows(audit: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(audit) as table:
        for batch in table.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _kept(folder: Path) -> Iterator[Record]:
    """The records of the first pass, as they went in; none where every record was rejected."""
    return collect(folder) if any(folder.glob("shard-*.tar")) else iter(())
