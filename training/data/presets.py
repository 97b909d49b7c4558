"""What `data filter` starts from, by the purpose of the data; a recipe's own fields come over it.

The thresholds are ours, as all are: `pretrain` asks for little but throws away what cannot teach; `refine` is the stage
of 640 px and asks for good pictures; `lora` trusts a person who chose a few pictures, and takes out what is broken,
tiny or there twice.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "pretrain": {"stages": [1, 2, 3, 4, 6, 7], "balance": {"power": 0.7, "tail": 10_000}},
    "refine": {
        "stages": [1, 2, 3, 4, 5, 6, 7],
        "quality": {"min_clarity": 0.5, "min_luma": 0.08, "max_luma": 0.9, "max_texture": 14.0},
        "captions": {"min_tokens": 8},
        "refinement": {"min_side": 640, "max_blockiness": 1.5, "max_border": 0.02, "max_watermark": 25.0},
        "balance": {"power": 0.5, "tail": 1_000},
    },
    "lora": {
        "stages": [1, 2],
        # A phone's pictures are turned, a painter's plain; nobody needs a model to judge their own.
        "without": ["nsfw", "rotation"],
        "curation": {"min_bytes": 1, "min_side": 256, "max_aspect": 4.0, "duplicate_bits": 1},
        "quality": {
            "min_clarity": 0.05, "min_luma": 0.01, "max_luma": 0.99, "max_saturation": 1.0, "min_entropy": 0.2,
            "max_texture": 60.0,
        },
    },
}  # fmt: skip
