"""How many threads share the work of a command on the CPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_image_fast import QwenImageTransformer2DModel

# Multiply-adds of a square linear layer below which a second thread costs more to wake than it takes over: the tiny
# model has 2.4 million at 128x128 and 38 million at 512x512 (docs/architecture.md, "Threads").
ENOUGH_TO_SHARE = 2**24


def share_or_not(transformer: QwenImageTransformer2DModel, tokens: int, pictures: int) -> None:
    """One thread for products too small to share, unless OMP_NUM_THREADS says how many."""
    import torch

    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    if "OMP_NUM_THREADS" not in os.environ and tokens * pictures * width**2 < ENOUGH_TO_SHARE:
        torch.set_num_threads(1)
