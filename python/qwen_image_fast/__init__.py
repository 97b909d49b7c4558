"""Qwen-Image, fast: fused kernels under the reference's Python API, stand-alone or as a diffusers drop-in."""

import torch  # noqa: F401  first, so that our kernels find torch's OpenMP runtime loaded and share its threads

from qwen_image_fast._C import build_info
from qwen_image_fast.accelerate import accelerate, restore
from qwen_image_fast.models.controlnet import QwenImageControlNetModel
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.ops import reference
from qwen_image_fast.pipelines.controlnet import QwenImageControlNetInpaintPipeline, QwenImageControlNetPipeline
from qwen_image_fast.pipelines.edit import QwenImageEditPipeline
from qwen_image_fast.pipelines.edit_inpaint import QwenImageEditInpaintPipeline
from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
from qwen_image_fast.pipelines.image_to_image import QwenImageImg2ImgPipeline
from qwen_image_fast.pipelines.inpaint import QwenImageInpaintPipeline
from qwen_image_fast.pipelines.layered import QwenImageLayeredPipeline
from qwen_image_fast.pipelines.prompt_enhancer import LocalEnhancer, OpenAIEnhancer
from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler

__version__ = build_info()["version"]

__all__ = [
    "AutoencoderKLQwenImage",
    "FlowMatchEulerDiscreteScheduler",
    "LocalEnhancer",
    "OpenAIEnhancer",
    "QwenImageControlNetInpaintPipeline",
    "QwenImageControlNetModel",
    "QwenImageControlNetPipeline",
    "QwenImageEditInpaintPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline",
    "QwenImageLayeredPipeline",
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    "accelerate",
    "build_info",
    "reference",
    "restore",
]
