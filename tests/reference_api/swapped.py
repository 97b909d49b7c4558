"""A plugin of pytest: diffusers' names stand for another package's classes, or for its own after `accelerate`.

`--classes` of "diffusers" changes nothing; "accelerated" accelerates whatever is made of a Qwen-Image class;
"stand-alone" puts this package's classes in the place of diffusers'. What tests load from the hub's
hf-internal-testing is the model of the package, and the editing pipelines bring pictures to a 64th of their areas.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from reference import Processor, smaller_sizes

import qwen_image_fast
from qwen_image_fast.models.diffusers_hooks import CacheMixin
from qwen_image_fast.models.peft_adapters import PeftAdapterMixin
from qwen_image_fast.models.rope import QwenEmbedLayer3DRope
from qwen_image_fast.models.vision import VisionProcessor

# Of this tree, whichever package is counted.
SHIPPED = Path(__file__).parents[2] / "python" / "qwen_image_fast" / "checkpoints" / "tiny"
CLASSES = ("diffusers", "accelerated", "stand-alone")
HUB = "hf-internal-testing/"
# Classes that tests ask for by their places in diffusers, to see what a model can do and has.
NAMESAKES = [
    ("diffusers.loaders.peft", PeftAdapterMixin), ("diffusers.models.cache_utils", CacheMixin),
    ("diffusers.models.transformers.transformer_qwenimage", QwenEmbedLayer3DRope),
]  # fmt: skip


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--classes", choices=CLASSES, default="diffusers")


def pytest_configure(config: Any) -> None:
    names = [name for name in qwen_image_fast.__all__ if hasattr(diffusers, name)]
    classes = config.getoption("--classes")
    if classes == "stand-alone":
        for name in names:
            setattr(diffusers, name, getattr(qwen_image_fast, name))
        # The public names stay diffusers' own, from which this package takes what its methods need.
        assert diffusers.CacheMixin is not CacheMixin and diffusers.loaders.PeftAdapterMixin is not PeftAdapterMixin
        for place, cls in NAMESAKES:
            setattr(importlib.import_module(place), cls.__name__, cls)
        diffusers.utils.logging.get_logger = log_of(diffusers.utils.logging.get_logger)
    elif classes == "accelerated":
        for name in names:
            cls = getattr(diffusers, name)
            if name.endswith("Pipeline") or name in ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage"):
                cls.__init__ = accelerating(cls.__init__)
    keep_local(classes)
    smaller_sizes(pytest.MonkeyPatch())


def accelerating(init: Any, within: list[Any] = []) -> Any:  # noqa: B006
    """within: what is being accelerated; meanwhile a VAE is made to count its work, which stays as it is."""

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if not within:
            within.append(self)
            try:
                qwen_image_fast.accelerate(self)
            finally:
                within.clear()

    return __init__


def log_of(get_logger: Any) -> Any:
    """Where diffusers' loading of pipelines logs, this package's does in another place."""
    names = {"diffusers.pipelines.pipeline_utils": "qwen_image_fast.pipelines.folder"}
    return lambda name=None: get_logger(names.get(name, name))


def keep_local(classes: str) -> None:
    """Read the parts of hf-internal-testing from the model of the package."""

    class Qwen2VLProcessor(Processor, transformers.ProcessorMixin):
        """That of transformers needs torchvision; pipelines are saved with one of its name."""

        def save_pretrained(self, folder: str, **given: Any) -> None:
            self.image_processor.save_pretrained(folder)

    def processor(name: str, **given: Any) -> Any:
        if classes == "stand-alone":
            return VisionProcessor.from_pretrained(SHIPPED / "processor")
        return Qwen2VLProcessor(
            transformers.Qwen2Tokenizer.from_pretrained(SHIPPED / "tokenizer"), SHIPPED / "processor"
        )

    Qwen2VLProcessor.__module__ = "transformers"
    transformers.Qwen2VLProcessor.from_pretrained = staticmethod(processor)
    for name, part in (("Qwen2Tokenizer", "tokenizer"), ("Qwen2_5_VLForConditionalGeneration", "text_encoder")):
        cls = getattr(transformers, name)
        cls.from_pretrained = classmethod(from_package(cls.from_pretrained.__func__, part))


def from_package(load: Any, part: str) -> Any:
    def from_pretrained(cls, name, *args, **kwargs):
        if str(name).startswith(HUB):
            name = SHIPPED / part
            kwargs.pop("subfolder", None)
        return load(cls, name, *args, **kwargs)

    return from_pretrained
