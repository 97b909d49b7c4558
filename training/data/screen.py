"""Pictures as training takes them: decoded, and judged by filters while the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qwen_image_fast.training.recipe.fields import RecipeError, convert

from .filters.picture import BrokenImage, Picture
from .recipe import FilterRecipe, SourceRecipe, validate
from .record import Record
from .without_effect import of_filters


class Rejected(ValueError):
    """A sample that is not used: `origin` says which, `reason` why, `tries` how many have failed so."""

    def __init__(self, origin: str, reason: str, tries: int = 1):
        super().__init__(origin, reason, tries)
        self.origin, self.reason, self.tries = origin, reason, tries


class Screen:
    """Decodes a record, or rejects it.

    Args:
        filters: fields of a `FilterRecipe` without `sources`; empty: only what cannot be decoded is rejected.
            Duplicates and the balance need all records, and are left to `data filter`.
    """

    def __init__(self, filters: Mapping[str, Any]):
        if "sources" in filters:
            raise RecipeError("recipe: data.filters must not have sources: they are those of the mixture")
        self.recipe = convert({**filters, "sources": []}, FilterRecipe, "")
        self.recipe.sources = [SourceRecipe("the mixture")]
        validate(self.recipe)
        if not filters:
            self.recipe.stages = []
        self._filters: list[Any] | None = None

    def said(self) -> Iterator[str]:
        """Sentences about the fields that have no effect while training goes on."""
        for sentence in of_filters(self.recipe, FilterRecipe(), training=True):
            yield f"data.filters: {sentence}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filters": None}  # their models are loaded where they are used

    def pixels(self, record: Record) -> np.ndarray:
        """uint8 [height, width, 3] of a record that passes; raises `Rejected`."""
        try:
            if self.recipe.stages:
                from .judge import judge

                record, row = judge(record, self._made(), self.recipe.curation.max_pixels)
                if not row["kept"]:
                    raise Rejected(record.origin, f"{row['filter']}: {row['reason']}")
            return Picture(record, self.recipe.curation.max_pixels).rgb
        except BrokenImage as error:
            raise Rejected(record.origin, f"broken_file: {error}") from error

    def _made(self) -> list[Any]:
        if self._filters is None:
            from .judge import build_filters

            self._filters = build_filters(self.recipe)
        return self._filters
