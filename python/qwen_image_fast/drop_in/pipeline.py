"""The pipelines of diffusers, which tell their transformer and text encoder what they are called for."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch

from qwen_image_fast.drop_in.batches import batch_methods, encoded_once
from qwen_image_fast.drop_in.branches import unfilled
from qwen_image_fast.drop_in.loop import Loop, current_loop
from qwen_image_fast.drop_in.swapped import Swapped

_encoding: ContextVar[bool] = ContextVar("qwen_image_fast_encoding", default=False)


class FastPipeline(Swapped):
    """Mixed into a diffusers pipeline, in front of it."""

    @classmethod
    def methods(cls, original: type) -> dict[str, Any]:
        def __call__(self, *args, **kwargs):
            loop = Loop(self)
            token = current_loop.set(loop)
            try:
                result = original.__call__(self, *args, **kwargs)
            finally:
                current_loop.reset(token)
            if loop.waiting is not None:
                raise unfilled()
            return result

        encode = encoded_once(original.encode_prompt)

        def encode_prompt(self, *args, **kwargs):
            token = _encoding.set(True)
            try:
                return encode(self, *args, **kwargs)
            finally:
                _encoding.reset(token)

        found = {f.__name__: functools.wraps(getattr(original, f.__name__))(f) for f in (__call__, encode_prompt)}
        return found | batch_methods(original)


def last_logits_only(module, args, kwargs):
    """Forward pre-hook of a text encoder: a pipeline that encodes a prompt reads hidden states and no logits."""
    if torch.compiler.is_compiling() or not _encoding.get() or "logits_to_keep" in kwargs or "labels" in kwargs:
        return None
    return args, kwargs | {"logits_to_keep": 1}


def add_text_hook(text_encoder: Any) -> bool:
    """Compute logits of one position while a prompt is encoded; False if that is done already."""
    if last_logits_only in text_encoder._forward_pre_hooks.values():
        return False
    text_encoder.register_forward_pre_hook(last_logits_only, with_kwargs=True)
    return True


def remove_text_hook(text_encoder: Any) -> bool:
    hooks = getattr(text_encoder, "_forward_pre_hooks", {})
    ours = [key for key, hook in hooks.items() if hook is last_logits_only]
    for key in ours:
        del hooks[key]
        del text_encoder._forward_pre_hooks_with_kwargs[key]
    return bool(ours)
