"""When diffusers' own forward has to run, because something of the user's would be passed over otherwise."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from qwen_image_fast.models.hooks import (
    at,
    has_hook,
    hooks_on_all_modules,
    left_out_and_watched,
    own_forward,
    some_weight,
)
from qwen_image_fast.ops import _library

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
EPS = 1e-6  # of every norm without weights
# Names of diffusers' hooks by which weights are stored in another type.
_CASTING = {"layerwise_casting", "peft_autocast_disable"}


def compute_dtype(hidden_states: Tensor) -> torch.dtype:
    """What a projection of `hidden_states` returns."""
    kind = hidden_states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype


def obstacle(model: Any, hidden_states: Tensor | None = None) -> str | None:
    """Why the fast forward may not run now, or None.

    It reads the norm weights and never calls the blocks, their attention, norms, activations and dropout, nor the text
    layers at the end of the last block. So these must be diffusers' own, without hooks: group and sequential
    offloading, step caches and context parallelism hook them.
    """
    place = some_weight(model) if hidden_states is None else hidden_states
    try:
        if not _library.use_reference():
            _library.check_device("accelerate", place)
    except NotImplementedError as error:
        return str(error)
    if hooks_on_all_modules():
        return "hooks on all modules are registered, of which the fast forward calls some"
    if not torch.compiler.is_compiling() and _library.transformed() and not _library.use_reference():
        return "torch.func or forward-mode autograd asks for derivatives that the ops do not have"
    dtype = None if hidden_states is None else compute_dtype(hidden_states)
    known = model._known
    if known.registry._active_backend != known.native:
        return f"the attention backend {known.registry._active_backend} was chosen"
    if (why := _unlike(model, known.top, "")) is not None:
        return why
    if (why := _positions(model)) is not None:
        return why
    custom = model._gradient_checkpointing_func if model.gradient_checkpointing else None
    if custom is not None and "enable_gradient_checkpointing" not in getattr(custom, "__qualname__", ""):
        return "a gradient checkpointing function of your own was set"
    for i, block in enumerate(model.transformer_blocks):
        if (why := _unlike(block, known.block, f"transformer_blocks.{i}")) is not None:
            return why
        if block.training and (why := _dropout(block, i)) is not None:
            return why
        attn = block._modules["attn"]
        processor, eps = attn.processor, attn._modules["norm_q"].eps
        if type(processor) is not known.processor:
            return f"transformer_blocks.{i}.attn has the processor {type(processor).__name__}"
        if processor._attention_backend not in (None, known.native) or processor._parallel_config is not None:
            return f"transformer_blocks.{i}.attn has an attention backend or a parallel configuration of its own"
        for name in _NORMS:
            norm = attn._modules[name]
            weight = norm._parameters.get("weight")
            if weight is None or norm._parameters.get("bias") is not None or norm.eps != eps:
                return f"transformer_blocks.{i}.attn.{name} is not a plain RMS norm"
            if dtype is not None and weight.dtype != dtype:
                return f"transformer_blocks.{i}.attn.{name} is stored as {weight.dtype}, the inputs are {dtype}"
            if weight.is_meta:
                return f"the weights of transformer_blocks.{i}.attn.{name} are not loaded"
    return _in_last_block(model)


def _dropout(block: Any, i: int) -> str | None:
    for path in (("attn", "to_out", "1"), ("img_mlp", "net", "1"), ("txt_mlp", "net", "1")):
        layer = at(block, path)
        if layer.training and layer.p > 0:
            return f"transformer_blocks.{i}.{'.'.join(path)} drops values in training"
    return None


def _in_last_block(model: Any) -> str | None:
    """A hook on a layer whose result would reach nothing, so that it is not computed."""
    last = model.transformer_blocks[-1]
    left_out = left_out_and_watched(last, lambda module: has_hook(module) or _own_forward(module))
    if left_out is None:
        return None
    i = len(model.transformer_blocks) - 1
    return f"transformer_blocks.{i}.{left_out} has a hook, and would not be called in the last block"


def _own_forward(module: nn.Module) -> bool:
    """Whether its forward was replaced by anything but what casts its weights while it runs."""
    registry = module.__dict__.get("_diffusers_hook")
    casting = registry is not None and registry.hooks.keys() <= _CASTING
    return not casting and own_forward(module)


def _unlike(root: nn.Module, expected: dict[tuple[str, ...], tuple[type, ...]], prefix: str) -> str | None:
    """The first module below `root` that has another class than expected, or a hook."""
    for path, classes in expected.items():
        module = at(root, path)
        if type(module) not in classes:
            return f"{'.'.join((prefix, *path)).lstrip('.')} is a {type(module).__name__}"
        if own_forward(module):
            return f"{'.'.join((prefix, *path)).lstrip('.')} has a hook (offloading, a step cache or the like)"
        if has_hook(module):
            return f"{'.'.join((prefix, *path)).lstrip('.')} has a hook"
        if (why := _other_settings(module)) is not None:
            return f"{'.'.join((prefix, *path)).lstrip('.')} has {why}"
    return None


def _other_settings(module: Any) -> str | None:
    """Of a module that is gone past: what of it the fast forward does not read."""
    if type(module) is nn.LayerNorm and (module.eps != EPS or module.weight is not None or module.bias is not None):
        return "another epsilon, or weights"
    if getattr(module, "approximate", "tanh") != "tanh":
        return f"the form {module.approximate} of GELU"
    return None


def _positions(model: Any) -> str | None:
    """What of the table of positions is not as the configuration says."""
    table, config = model.pos_embed, model.config
    expected = (10000, list(config.axes_dims_rope), True)
    if (table.theta, list(table.axes_dim), table.scale_rope) != expected:
        return "pos_embed has other settings than the configuration"
    return None


def known_parts() -> types.SimpleNamespace:
    """diffusers' classes for the modules that the fast forward goes past; a class attribute of the fast transformer."""
    from diffusers.models import activations, attention, attention_dispatch, attention_processor, normalization
    from diffusers.models.transformers import transformer_qwenimage as qwen

    block: dict[tuple[str, ...], tuple[type, ...]] = {
        (): (qwen.QwenImageTransformerBlock,),
        ("attn",): (attention_processor.Attention,),
    }
    block |= {("attn", name): (normalization.RMSNorm,) for name in _NORMS}
    for stream in ("img", "txt"):
        block |= {(f"{stream}_norm{i}",): (nn.LayerNorm,) for i in (1, 2)}
        block[(f"{stream}_mod",)] = (nn.Sequential,)
        block[(f"{stream}_mod", "0")] = (nn.SiLU,)
        block[(f"{stream}_mlp",)] = (attention.FeedForward,)
        block[(f"{stream}_mlp", "net", "0")] = (activations.GELU,)
        block[(f"{stream}_mlp", "net", "1")] = (nn.Dropout,)
    block["attn", "to_out", "1"] = (nn.Dropout,)
    top = {
        ("time_text_embed",): (qwen.QwenTimestepProjEmbeddings,),  # it is called with less than there
        ("pos_embed",): (qwen.QwenEmbedRope, qwen.QwenEmbedLayer3DRope),
        ("norm_out",): (normalization.AdaLayerNormContinuous,),
        ("norm_out", "norm"): (nn.LayerNorm,),
        ("norm_out", "silu"): (nn.SiLU,),
    }
    return types.SimpleNamespace(
        block=block,
        top=top,
        processor=qwen.QwenDoubleStreamAttnProcessor2_0,
        registry=attention_dispatch._AttentionBackendRegistry,
        native=attention_dispatch.AttentionBackendName.NATIVE,
    )
