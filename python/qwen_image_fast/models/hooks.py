"""Whether something of the user's runs when a module is called: a hook of any kind, or a forward of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

logger = logging.getLogger(__name__)

# Modules of a block of the stand-alone transformer that hold what it reads, and are not called.
_UNCALLED = [
    tuple(name.split("."))
    for name in (
        "attn", "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k", "img_mod", "img_mod.0",
        "img_mlp", "img_mlp.net.0", "img_mlp.net.1", "txt_mod", "txt_mod.0", "txt_mlp", "txt_mlp.net.0",
        "txt_mlp.net.1",
    )
]  # fmt: skip

# Where torch keeps the hooks on all modules; before torch 2.8 it has no function that looks at all of them.
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


def hooks_on_all_modules() -> bool:
    return any(getattr(nn_module, name) for name in _GLOBAL_HOOKS)


def has_hook(module: nn.Module) -> bool:
    """Of those that torch knows: before and after forward, and backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_bare(*modules: nn.Module) -> bool:
    """Whether nothing of the user's runs when these are called."""
    return not hooks_on_all_modules() and not any(has_hook(m) or "forward" in vars(m) for m in modules)


def own_forward(module: nn.Module) -> bool:
    """Whether its forward was replaced on the object; what a hook left behind when it was removed is none."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def at(module: Any, path: Sequence[str]) -> Any:
    """The module below `module`, or None."""
    for name in path:
        module = module._modules.get(name)
        if module is None:
            break
    return module


def check_uncalled(model: Any) -> None:
    """Warn, once, of a hook on a module of the stand-alone transformer that it does not call.

    Raises:
        ValueError: the hook brings weights, which would be read before they are there.
    """
    if torch.compiler.is_compiling():
        return
    found: list[tuple[str, ...]] = [("norm_out",)] if _watched(model.norm_out) else []
    for i, block in enumerate(model.transformer_blocks):
        if _offloads(block):
            found.append(("transformer_blocks", str(i)))
        for path in _UNCALLED:
            if _watched(at(block, path)):
                found.append(("transformer_blocks", str(i), *path))
    if any(_offloads(at(model, path)) for path in found):
        raise ValueError(
            "QwenImageTransformer2DModel: weights cannot be offloaded by hooks of diffusers or accelerate, as they are "
            "read outside of the modules that have them; from_pretrained(memory_limit=) streams what does not fit"
        )
    if found and model.__dict__.get("_said") != found:
        model.__dict__["_said"] = found
        logger.warning("a hook on %s never runs: this model reads its weights and does not call it", ".".join(found[0]))


def _watched(module: nn.Module) -> bool:
    return own_forward(module) or has_hook(module)


def _offloads(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    return getattr(module.__dict__.get("_hf_hook"), "offload", False) or (
        registry is not None and any("offload" in name for name in registry.hooks)
    )
