"""Masks and pictures of diffusers' batches with several images for each of several prompts.

A batch holds the images of a prompt side by side. diffusers repeats the masks of the prompts' padding, the pictures and
their masks as a whole: of two prompts with two images each, the second image gets those of the second prompt. Here each
is repeated beside itself, and a picture is drawn from the generator of its prompt's first image, as where that prompt
is alone.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

from torch import Tensor

# The images of a batch, while a pipeline prepares its latents.
_images: ContextVar[int] = ContextVar("qwen_image_fast_images", default=0)


def encoded_once(theirs: Any) -> Any:
    """`encode_prompt` with its states and masks repeated beside themselves."""
    signature = inspect.signature(theirs)

    def method(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        images = bound.arguments.get("num_images_per_prompt", 1)
        bound.arguments["num_images_per_prompt"] = 1
        found = theirs(*bound.args, **bound.kwargs)
        return tuple(x if x is None else x.repeat_interleave(images, 0) for x in found)

    return method


def batch_methods(original: type) -> dict[str, Any]:
    """The methods of a pipeline class that prepare latents, of those that encode pictures."""
    if not hasattr(original, "_encode_vae_image"):
        return {}
    cls: Any = original
    found = [_encode_vae_image(cls), _prepare(cls, "prepare_latents", ("image",))]
    if hasattr(cls, "prepare_mask_latents"):
        found.append(_prepare(cls, "prepare_mask_latents", ("mask", "masked_image")))
    return {method.__name__: method for method in found}


def _prepare(original: Any, name: str, pictures: tuple[str, ...]) -> Any:
    theirs = getattr(original, name)
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def method(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        images = given["batch_size"] * given.get("num_images_per_prompt", 1)
        for key in pictures:
            # Pixels are repeated when they are encoded.
            if isinstance(x := given.get(key), Tensor) and (key == "mask" or x.shape[1] == self.latent_channels):
                given[key] = x.repeat_interleave(_each(x, images), 0)
        token = _images.set(images)
        try:
            return theirs(*bound.args, **bound.kwargs)
        finally:
            _images.reset(token)

    return method


def _encode_vae_image(original: Any) -> Any:
    theirs = original._encode_vae_image

    @functools.wraps(theirs)
    def method(self, image, generator):
        images = _images.get()
        each = _each(image, images)
        if each > 1 and isinstance(generator, list) and len(generator) == images:
            generator = generator[::each]
        return theirs(self, image=image, generator=generator).repeat_interleave(each, 0)

    return method


def _each(x: Tensor, images: int) -> int:
    """Images for each of several pictures; 1 where there is one picture, or as many as images."""
    several = len(x) > 1 and images % len(x) == 0
    return max(images // len(x), 1) if several else 1
