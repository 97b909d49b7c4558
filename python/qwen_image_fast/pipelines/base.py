"""What the pipelines share: their components, loading and saving folders, devices."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from qwen_image_fast.checkpoint import json_bytes
from qwen_image_fast.files import atomic_write
from qwen_image_fast.folders import read_json, resolve_folder
from qwen_image_fast.graphs import StepGraphs
from qwen_image_fast.models.controlnet import QwenImageControlNetModel
from qwen_image_fast.models.outputs import Output
from qwen_image_fast.models.text_encoder import load_captioner, load_text_encoder
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.models.vae import AutoencoderKLQwenImage
from qwen_image_fast.models.vision import VisionProcessor
from qwen_image_fast.pipelines.lora import LoraMixin
from qwen_image_fast.pipelines.prompt_enhancer import PromptEnhancer
from qwen_image_fast.request import GENERATION_FILE
from qwen_image_fast.schedulers import FlowMatchEulerDiscreteScheduler

# The library names of model_index.json, as diffusers writes them.
_PARTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
CONTROLNET: dict[str, list[str]] = {"controlnet": ["diffusers", "QwenImageControlNetModel"]}
PROCESSOR: dict[str, list[str]] = {"processor": ["transformers", "Qwen2VLProcessor"]}


@dataclass
class QwenImagePipelineOutput(Output):
    """images: prompt-major; PIL images in a list, arrays, tensors and latents of one size stacked, else in a list.
    seeds: of every image. prompts: as encoded."""

    images: Any
    seeds: list[int | None] = field(default_factory=list)
    prompts: list[str] | None = None


class Pipeline(LoraMixin):
    """Components, `from_pretrained`, `save_pretrained`, `to`, and the seconds of each stage of the last call."""

    # The components, with library and class as in model_index.json.
    parts: ClassVar[dict[str, list[str]]] = _PARTS
    # Whether the vision tower of the condition encoder is loaded.
    uses_vision = False
    # Whether it is loaded with its language-model head, to write captions.
    writes_captions = False

    def __init__(self, scheduler, vae, text_encoder, tokenizer, transformer, *, free_modulation_weights: bool = False):
        self.scheduler = scheduler
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.free_modulation_weights = free_modulation_weights
        # Rewrites prompts before they are encoded; see pipelines/prompt_enhancer.py.
        self.prompt_enhancer: PromptEnhancer | None = None
        self.cuda_graphs: StepGraphs | None = None
        self.times: dict[str, float] = {}
        self._interrupt = False
        self._source: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | None = None,
        local_files_only: bool | None = None,
        free_modulation_weights: bool = False,
        **components,
    ):
        """The pipeline of a diffusers-layout folder or hub repository; nothing of diffusers is needed.

        Args:
            torch_dtype: of all models; None: as stored. device: where the weights go, tensor by tensor.
            variant: "fp16" reads `*.fp16.safetensors` of the transformer and the VAE.
            free_modulation_weights: release the modulation weights (a third of the transformer) once the vectors of a
                schedule are known; another schedule reads them from the folder again.
            components: ready-made parts to use instead of the folder's (`transformer=...`).

        Raises:
            FileNotFoundError, ValueError: what is missing, damaged or of another model, in one sentence.
        """
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        folder = resolve_folder(name_or_path, **hub)
        index = read_json(folder / "model_index.json")
        if not str(index.get("_class_name", "")).startswith("QwenImage"):
            raise ValueError(
                f"from_pretrained: {folder} must hold a Qwen-Image pipeline, its model_index.json names "
                f"{index.get('_class_name')}"
            )
        if unknown := set(components) - set(cls.parts):
            raise TypeError(f"from_pretrained: components must be of {', '.join(cls.parts)}, got {', '.join(unknown)}")
        models: dict[str, Any] = {"torch_dtype": torch_dtype, "device": device}
        loaders = {
            "scheduler": lambda: FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
            "tokenizer": lambda: _load_tokenizer(folder / "tokenizer"),
            "text_encoder": lambda: (
                load_captioner(folder / "text_encoder", **models)
                if cls.writes_captions
                else load_text_encoder(folder / "text_encoder", vision=cls.uses_vision, **models)
            ),
            "vae": lambda: AutoencoderKLQwenImage.from_pretrained(folder, subfolder="vae", variant=variant, **models),
            "transformer": lambda: QwenImageTransformer2DModel.from_pretrained(
                folder, subfolder="transformer", variant=variant, **models
            ),
        }
        if "processor" in cls.parts:
            loaders["processor"] = lambda: _load_processor(folder / "processor")
        if "controlnet" in cls.parts:
            loaders["controlnet"] = lambda: QwenImageControlNetModel.from_pretrained(
                folder, subfolder="controlnet", variant=variant, **models
            )
        parts = {name: components[name] if name in components else load() for name, load in loaders.items()}
        pipe = cls(**parts, free_modulation_weights=free_modulation_weights)
        pipe._source = folder
        return pipe

    def save_pretrained(self, folder: str | os.PathLike, *, max_shard_size: int | str = "10GB") -> None:
        """Write the whole pipeline as a diffusers-layout folder, which diffusers reads too.

        The condition encoder and the tokenizer of a pipeline that was loaded from a folder are copied from there, with
        the parts (head, vision tower) that this pipeline did not load.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
        self.vae.save_pretrained(folder / "vae", max_shard_size=max_shard_size)
        self.scheduler.save_pretrained(folder / "scheduler")
        for name in [n for n in ("text_encoder", "tokenizer", "processor") if n in self.parts]:
            if self._source is None or not (self._source / name).is_dir():
                getattr(self, name).save_pretrained(folder / name)
            elif (self._source / name).resolve() != (folder / name).resolve():
                shutil.copytree(self._source / name, folder / name, dirs_exist_ok=True)
        if self._source is not None and (self._source / GENERATION_FILE).is_file():
            generation = (self._source / GENERATION_FILE).read_bytes()
            atomic_write(folder / GENERATION_FILE, lambda file: file.write(generation))
        index = {"_class_name": type(self).__name__, "_diffusers_version": "0.36.0", **self.parts}
        atomic_write(folder / "model_index.json", lambda file: file.write(json_bytes(index)))

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.parts}

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def to(self, *args, **kwargs):
        """Move or cast all models, as `torch.nn.Module.to`; returns the pipeline."""
        for part in self._modules:
            part.to(*args, **kwargs)
        return self

    def enable_cuda_graphs(self, limit: int = 4) -> None:
        """Capture the transformer's pass once for a shape (image sizes and text lengths) and replay it from then on.

        The first step of a new shape takes the time of a few. Up to `limit` shapes share the working memory of the
        largest; with one more, all are captured anew as they come. So they are where weights or LoRAs changed in a
        way that a graph does not see; a new schedule needs no new graph.

        Raises:
            ValueError: the transformer is not on a CUDA device.
        """
        device = self.transformer.proj_out.weight.device
        if device.type != "cuda":
            raise ValueError(f"enable_cuda_graphs: the transformer must be on cuda, got {device}")
        self.cuda_graphs = StepGraphs(limit)

    def disable_cuda_graphs(self) -> None:
        """Run passes one kernel after another again, and free the graphs' memory."""
        self.cuda_graphs = None

    @property
    def _modules(self) -> list[Any]:
        """The models, some of which a pipeline may have several of."""
        return [self.transformer, self.vae, self.text_encoder]

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** len(self.vae.temperal_downsample)

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step, as in diffusers."""
        return self._interrupt

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to `times[name]`."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start


def _load_tokenizer(folder: Path):
    from transformers import Qwen2Tokenizer

    if not folder.is_dir():
        raise FileNotFoundError(f"from_pretrained: there is no tokenizer folder {folder}")
    return Qwen2Tokenizer.from_pretrained(folder)


def _load_processor(folder: Path) -> VisionProcessor:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"from_pretrained: there is no processor folder {folder}; editing needs an editing model's folder"
        )
    return VisionProcessor.from_pretrained(folder)
