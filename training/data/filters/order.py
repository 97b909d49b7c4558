"""All filters in the order in which they run, and their stages."""

from __future__ import annotations

from . import captions, curation, duplicates, portrait, quality, refinement, text
from .base import Filter

FILTERS: tuple[type[Filter], ...] = (
    curation.BrokenFile, curation.FileSize, curation.Resolution, curation.AspectRatio, duplicates.ExactDuplicate,
    duplicates.NearDuplicate, curation.Nsfw,
    quality.Rotation, quality.Clarity, quality.Luma, quality.Saturation, quality.RgbEntropy, quality.Texture,
    captions.TokenLength, captions.InvalidCaption, captions.Alignment,
    text.LanguageSplit, text.IntensiveText, text.SmallCharacters,
    refinement.RefinedResolution, refinement.ImageQuality, refinement.Aesthetic, refinement.Codes, refinement.Border,
    refinement.Watermark, refinement.AbnormalElement,
    portrait.FaceMosaic,
)  # fmt: skip
FILTER_NAMES = (*(f.name for f in FILTERS), "category_balance", "taxonomy")
STAGE_OF = {**{f.name: f.stage for f in FILTERS}, "category_balance": 6, "taxonomy": 7}
