"""On how many threads a process of an engine computes."""

from __future__ import annotations

from typing import Any

import torch

from qwen_image_fast.serving.settings import Model

# Models as narrow as this one are fastest on one thread: a second one costs more to wake than it does.
NARROW = 384


def use_threads(model: Model, transformer: Any) -> None:
    """As many as it is told, or as its model is wide enough for."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    if model.threads is not None or (width < NARROW and model.device == "cpu"):
        torch.set_num_threads(model.threads or 1)
