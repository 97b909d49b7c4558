"""All filters in the order in which they run, and their stages.

Duplicates are of stage 1, and judged after the filters that look at one record: a copy of a picture that goes for
another reason is no copy. The balance comes last, so that it counts no picture twice.
"""

from __future__ import annotations

from . import captions, curation, portrait, quality, refinement, text
from .base import Filter

FILTERS: tuple[type[Filter], ...] = (
    curation.BrokenFile, curation.FileSize, curation.Resolution, curation.AspectRatio, curation.Nsfw,
    quality.Rotation, quality.Clarity, quality.Luma, quality.Saturation, quality.RgbEntropy, quality.Texture,
    captions.TokenLength, captions.InvalidCaption, captions.Alignment,
    text.LanguageSplit, text.IntensiveText, text.SmallCharacters,
    refinement.RefinedResolution, refinement.ImageQuality, refinement.Aesthetic, refinement.Codes, refinement.Border,
    refinement.Watermark, refinement.AbnormalElement,
    portrait.FaceMosaic,
)  # fmt: skip
DUPLICATES = ("exact_duplicate", "near_duplicate")
# Filters with a score, each a column of the audit.
SCORED = (*(f.name for f in FILTERS), *DUPLICATES)
FILTER_NAMES = (*SCORED, "category_balance", "taxonomy")
STAGE_OF = {**{f.name: f.stage for f in FILTERS}, **dict.fromkeys(DUPLICATES, 1), "category_balance": 6, "taxonomy": 7}
