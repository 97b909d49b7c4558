"""Giving an object another class, and taking it away again."""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

from torch import nn

from qwen_image_fast.drop_in.pipeline import FastPipeline
from qwen_image_fast.drop_in.swapped import Swapped, SwappedType
from qwen_image_fast.drop_in.transformer import FastTransformer
from qwen_image_fast.drop_in.vae import FastCausalConv3d, FastResample, FastResidualBlock, FastRMSNorm, FastVAE


def new_swapped(original: type) -> Any:
    cls = fast_class(original)
    return cls.__new__(cls)


@functools.cache
def vae_classes() -> tuple[type, ...]:
    """The VAE of Qwen-Image and, where diffusers has it, that of Qwen-Image-2.1, which is made of the same layers."""
    import diffusers

    names = ("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21")
    return tuple(getattr(diffusers, name) for name in names if hasattr(diffusers, name))


@functools.cache
def fast_class(original: type) -> type | None:
    """The class that replaces `original`; None: there is no such class."""
    from diffusers import QwenImageTransformer2DModel

    layers = {
        "CausalConv3d": FastCausalConv3d, "RMS_norm": FastRMSNorm, "ResidualBlock": FastResidualBlock,
        "Resample": FastResample,
    }  # fmt: skip
    mixins: dict[type, type] = {QwenImageTransformer2DModel: FastTransformer}
    for vae in vae_classes():
        family, module = vae.__name__.removeprefix("AutoencoderKL"), importlib.import_module(vae.__module__)
        mixins |= {vae: FastVAE} | {getattr(module, family + name): mixin for name, mixin in layers.items()}
    mixin = mixins.get(original)
    if original.__module__.startswith("diffusers.pipelines.qwenimage."):
        mixin = FastPipeline
    if mixin is None:
        return None
    body = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"_original": original, "_rebuild": staticmethod(new_swapped)}
    return SwappedType(original.__name__, (mixin, original), body | mixin.methods(original))


def swap(obj: Any) -> bool:
    """Give `obj` its fast class; False if it has none, or if the new forward would not be reached."""
    cls = fast_class(type(obj))
    if cls is None or not _rebind(obj, type(obj), cls):
        return False
    object.__setattr__(obj, "__class__", cls)
    return True


def unswap(obj: Any) -> bool:
    """Give `obj` its own class back; False if it has it."""
    if not isinstance(obj, Swapped):
        return False
    for name in (*obj._caches, *obj._settings):
        obj.__dict__.pop(name, None)
    _rebind(obj, type(obj), obj._original)
    object.__setattr__(obj, "__class__", obj._original)
    return True


def _rebind(obj: Any, old: type, new: type) -> bool:
    """Let hooks that keep `obj.forward` of the old class (offloading, caching) call the new one.

    accelerate and diffusers hooks put a wrapper on the instance, and keep the bound method that was there before.
    """
    if not isinstance(obj, nn.Module) or old.forward is new.forward:
        return True
    places: list[tuple[dict, str]] = [(obj.__dict__, name) for name in ("forward", "_old_forward")]
    if (registry := obj.__dict__.get("_diffusers_hook")) is not None:
        places += [(ref.__dict__, name) for ref in registry._fn_refs for name in ("forward", "original_forward")]
    found = False
    for holder, name in places:
        if getattr(holder.get(name), "__func__", None) is old.forward:
            holder[name] = types.MethodType(new.forward, obj)
            found = True
    return found or "forward" not in obj.__dict__
