"""Whether something of the user's runs when a module is called: a hook of any kind, or a forward of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

logger = logging.getLogger(__name__)

# Modules of a block of the stand-alone transformer that hold what its packed forward reads, and are not called.
_UNCALLED = [
    tuple(name.split("."))
    for name in (
        "attn", "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k", "attn.to_out.1", "img_mod",
        "img_mod.0", "img_mlp", "img_mlp.net.0", "img_mlp.net.1", "txt_mod", "txt_mod.0", "txt_mlp", "txt_mlp.net.0",
        "txt_mlp.net.1",
    )
]  # fmt: skip

# What reaches no result of a transformer, in its last block: the queries and the end of the text stream.
_LEFT_OUT = [
    tuple(name.split("."))
    for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
]

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


def some_weight(model: Any) -> torch.Tensor:
    """A weight whose type and place are those of a transformer's: of `proj_out`, unless that was replaced."""
    weight = getattr(model.proj_out, "weight", None)
    return weight if weight is not None else next(p for p in model.parameters() if p.is_floating_point())


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


def needs_calls(model: Any) -> bool:
    """Whether something is on the stand-alone transformer that only runs where every module is called (called.py).

    That is a hook on a block, on a module that the packed forward reads without calling it, or on one whose result
    reaches nothing; a forward in the place of its own, as step caches and offloading put there; an attention processor.
    """
    if _watched(model.norm_out) or _watched(at(model.norm_out, ["silu"])):
        return True
    if own_forward(model.img_in) or own_forward(model.proj_out):
        return True
    for block in model.transformer_blocks:
        if own_forward(block) or users_hook(block) or block.attn.has_processor:
            return True
        if any(_watched(at(block, path)) for path in _UNCALLED):
            return True
    return left_out_and_watched(model.transformer_blocks[-1]) is not None


def left_out_and_watched(last: nn.Module, watched: Callable[[nn.Module], bool] | None = None) -> str | None:
    """The first module of the last block that a packed forward leaves out, and on which something of the user's is.

    watched: tells whether something is; default: any hook, or a forward in the place of the module's own.
    """
    for path in _LEFT_OUT:
        left_out = at(last, path)
        if left_out is None:
            return ".".join(path)
        for name, module in left_out.named_modules():
            if (watched or _watched)(module):
                return ".".join(filter(None, (*path, name)))
    return None


def users_hook(module: nn.Module) -> bool:
    """Whether a hook is on a module that torch's sharding did not put there."""
    return has_hook(module) and not _sharded(module)


def _sharded(module: nn.Module) -> bool:
    """By FSDP, whose own hooks on it serve either form; a user's beside them are run with `Stream`s."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _watched(module: nn.Module | None) -> bool:
    """None: the module is gone, as one above it was replaced."""
    return module is None or own_forward(module) or has_hook(module)


def hook_of_diffusers(model: nn.Module, name: str) -> Any:
    """That of this name on a model, or on the first of its modules with parameters; None: there is none.

    What moves or casts weights is on all modules, or on the model too.
    """
    for module in (model, _first(model)):
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and (hook := registry.get_hook(name)) is not None:
            return hook
    return None


def computing_device(model: nn.Module) -> torch.device:
    """Where the weights of a model are while they are computed with."""
    if (moved := hook_of_diffusers(model, "group_offloading")) is not None:
        return torch.device(moved.group.onload_device)
    place = getattr(_first(model).__dict__.get("_hf_hook"), "execution_device", None)  # accelerate's
    return next(model.parameters()).device if place is None else torch.device(place)


def _first(model: nn.Module) -> nn.Module:
    return next((module for module in model.modules() if module._parameters), model)
