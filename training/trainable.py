"""Which weights learn: all, or the adapters alone; never those that the loss does not depend on."""

from __future__ import annotations

from typing import Any

from qwen_image_fast.training.lora import is_adapter

# The text output of the last block reaches nothing, so these never get a gradient.
DEAD_IN_LAST_BLOCK = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")


def freeze_dead(transformer: Any) -> list[str]:
    """Freeze what the loss does not depend on, so that optimiser states and averages exist exactly for what learns."""
    last = transformer.transformer_blocks[-1]
    names = [n for n, _ in last.named_parameters() if n.startswith(DEAD_IN_LAST_BLOCK)]
    for name in names:
        last.get_parameter(name).requires_grad_(False)
    return names


def choose_trainable(transformer: Any, *, adapters: bool) -> None:
    """Let all weights learn, or the adapters alone; never those that the loss does not depend on."""
    for name, p in transformer.named_parameters():
        p.requires_grad_(is_adapter(name) or not adapters)
    freeze_dead(transformer)
