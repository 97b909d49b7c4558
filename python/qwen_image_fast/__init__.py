"""Qwen-Image, fast: fused kernels under the reference's Python API, stand-alone or as a diffusers drop-in.

The names below are imported when they are first used; `import qwen_image_fast` alone imports neither torch nor
transformers.
"""

from importlib import import_module

TYPE_CHECKING = False  # that of typing to type checkers; importing typing is half of what this import takes
if TYPE_CHECKING:
    from typing import Any

    from qwen_image_fast._C import build_info
    from qwen_image_fast.drop_in.accelerate import accelerate, restore
    from qwen_image_fast.models.controlnet import QwenImageControlNetModel, QwenImageMultiControlNetModel
    from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
    from qwen_image_fast.models.vae import AutoencoderKLQwenImage
    from qwen_image_fast.ops import reference
    from qwen_image_fast.pipelines.controlnet import QwenImageControlNetInpaintPipeline, QwenImageControlNetPipeline
    from qwen_image_fast.pipelines.edit import QwenImageEditPipeline
    from qwen_image_fast.pipelines.edit_inpaint import QwenImageEditInpaintPipeline
    from qwen_image_fast.pipelines.edit_plus import QwenImageEditPlusPipeline
    from qwen_image_fast.pipelines.edit_plus_inpaint import QwenImageEditPlusInpaintPipeline
    from qwen_image_fast.pipelines.image_to_image import QwenImageImg2ImgPipeline
    from qwen_image_fast.pipelines.inpaint import QwenImageInpaintPipeline
    from qwen_image_fast.pipelines.layered import QwenImageLayeredPipeline
    from qwen_image_fast.pipelines.prompt_enhancer import LocalEnhancer, OpenAIEnhancer
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
    from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler

    _C: Any

__version__ = "0.1.0"

# Where each name is. No module of the package itself may have one of these names: importing it would hide the name.
_HOMES = {
    "AutoencoderKLQwenImage": "models.vae",
    "FlowMatchEulerDiscreteScheduler": "schedulers",
    "LocalEnhancer": "pipelines.prompt_enhancer",
    "OpenAIEnhancer": "pipelines.prompt_enhancer",
    "QwenImageControlNetInpaintPipeline": "pipelines.controlnet",
    "QwenImageControlNetModel": "models.controlnet",
    "QwenImageControlNetPipeline": "pipelines.controlnet",
    "QwenImageEditInpaintPipeline": "pipelines.edit_inpaint",
    "QwenImageEditPipeline": "pipelines.edit",
    "QwenImageEditPlusInpaintPipeline": "pipelines.edit_plus_inpaint",
    "QwenImageEditPlusPipeline": "pipelines.edit_plus",
    "QwenImageImg2ImgPipeline": "pipelines.image_to_image",
    "QwenImageInpaintPipeline": "pipelines.inpaint",
    "QwenImageLayeredPipeline": "pipelines.layered",
    "QwenImageMultiControlNetModel": "models.controlnet",
    "QwenImagePipeline": "pipelines.text_to_image",
    "QwenImageTransformer2DModel": "models.transformer",
    "accelerate": "drop_in.accelerate",
    "build_info": "_C",
    "reference": "ops",
    "restore": "drop_in.accelerate",
}

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
    "QwenImageEditPlusInpaintPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline",
    "QwenImageLayeredPipeline",
    "QwenImageMultiControlNetModel",
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    "accelerate",
    "build_info",
    "reference",
    "restore",
]


def __getattr__(name: str) -> "Any":
    if name not in _HOMES and name not in ("_C", "ops"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("torch")  # first, so that our kernels find torch's OpenMP runtime loaded and share its threads
    try:
        if name not in _HOMES:
            return import_module(f"{__name__}.{name}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ImportError as error:
        if "libgomp" not in str(error):
            raise
        raise ImportError(
            "qwen_image_fast needs OpenMP's runtime libgomp.so.1, which neither torch nor this system has: install it "
            "with `apt-get install libgomp1`, `dnf install libgomp`, or what this system has for it",
            name=error.name,
            path=error.path,
        ) from error
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
