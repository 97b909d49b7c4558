"""A small transformer in diffusers' class and the stand-alone one, and a pipeline, for what calls every module."""

from __future__ import annotations

from accelerate_harness import CONFIG, small_transformer

from qwen_image_fast import QwenImageTransformer2DModel

CALL = {"prompt": '"HI" in red', "height": 48, "width": 32, "num_inference_steps": 4, "seed": 0, "progress": False}


def pair(**changes):
    """diffusers' model and the stand-alone one of the same weights."""
    theirs = small_transformer(**changes)
    ours = QwenImageTransformer2DModel(**{**CONFIG, **changes}).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def latents(pipe, **change):
    return pipe(**{**CALL, "output_type": "latent", **change}).images
