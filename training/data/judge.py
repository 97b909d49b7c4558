"""The filters of a recipe, and what they say of one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from .faults import sentence
from .filters import captions, curation, duplicates, portrait, quality, refinement, text
from .filters.base import Filter
from .filters.order import FILTERS, SCORED, STAGE_OF
from .filters.picture import Picture
from .recipe import FilterRecipe
from .record import Record


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
    return {name: found.get(name, (None, None)) for name in SCORED}


def build_filters(
    recipe: FilterRecipe,
    *,
    reader: text.TextReader | None = None,
    aesthetic: captions.Scorer | None = None,
    alignment: captions.Scorer | None = None,
) -> list[Filter]:
    """The filters of a recipe's stages, in order; those that judge one record at a time.

    Args:
        reader: of text, for stage 4; None: `evaluation.ocr.Reader`.
        aesthetic: for stage 5; None: that filter is left out.
        alignment: for stage 3, of all captions; None: the models of the recipe, or left out where it names none.

    Raises:
        ImportError, FileNotFoundError: a filter lacks its package or its model; the sentence says what to do.
    """
    bounds, words = limits(recipe), recipe.captions

    def aligned() -> Filter | None:
        paths = words.chinese_clip, words.siglip
        made = {path: alignment or captions.clip_scorer(path) for path in dict.fromkeys(paths)}  # each model once
        return captions.Alignment(words.min_alignment, *(made[path] for path in paths)) if any(made.values()) else None

    def read() -> Filter:
        from ..evaluation.ocr import Reader

        return text.LanguageSplit(reader or Reader())

    make: dict[str, Callable[[], Filter | None]] = {
        "broken_file": lambda: curation.BrokenFile(),
        "file_size": lambda: curation.FileSize(*bounds["file_size"]),
        "resolution": lambda: curation.Resolution(*bounds["resolution"]),
        "aspect_ratio": lambda: curation.AspectRatio(*bounds["aspect_ratio"]),
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


class FilterFailure(RuntimeError):
    """A filter could not judge a record. filter: its name; row: of the audit, up to there."""

    def __init__(self, name: str, why: str, row: dict[str, Any]):
        super().__init__(f"{name} failed on it: {why}")
        self.filter, self.row = name, row


def judge(
    record: Record, filters: Iterable[Filter], max_pixels: int, min_entropy: float | None = None
) -> tuple[Record, dict[str, Any]]:
    """The record, with what the filters found in its metadata, and its row of the audit.

    Filters run in order until one rejects; the scores of those after it are missing from the row. Of the stages 2 and
    3, records of the category Synthetic, whose text was drawn and whose caption is known, see none.

    Args:
        min_entropy: the row of a record that passes gets `hash`, see `duplicates.comparable_hash`; None: it does not.

    Raises:
        FilterFailure: a filter raised an error.
    """
    picture = Picture(record, max_pixels)
    row: dict[str, Any] = {
        "id": record.id, "origin": record.origin, "source": record.source, "category": record.category, "kept": True,
    }  # fmt: skip
    for one in filters:
        if one.stage in (2, 3) and record.category == "Synthetic":
            continue
        try:
            verdict = one.judge(picture)
        except Exception as error:  # of whatever library or model
            raise FilterFailure(one.name, sentence(error), row) from error
        row[one.name] = verdict.score
        if verdict.reason is not None:
            row.update(rejection(one.name, verdict.reason))
            break
    if row.get("broken_file"):
        row["height"], row["width"] = picture.size
    if row["kept"] and min_entropy is not None:
        row["hash"] = duplicates.comparable_hash(picture, min_entropy)
    row.update(picture.tags)
    if picture.tags:
        record = dataclasses.replace(record, metadata={**record.metadata, **picture.tags})
    return record, row


def rejection(name: str, reason: str) -> dict[str, Any]:
    return {"kept": False, "stage": STAGE_OF[name], "filter": name, "reason": reason}
