"""What the pipelines share: their components, devices, what a call reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from qwen_image_fast.graphs import Lengths, StepGraphs
from qwen_image_fast.keywords import check_visible, hinted
from qwen_image_fast.models.outputs import Output
from qwen_image_fast.parallel.ranks import start_ranks
from qwen_image_fast.parallel.split import Split
from qwen_image_fast.pipelines.counterparts import Counterparts
from qwen_image_fast.pipelines.folder import PipelineFolder
from qwen_image_fast.pipelines.lora import LoraMixin
from qwen_image_fast.pipelines.offload import OffloadMixin
from qwen_image_fast.pipelines.prompt_enhancer import PromptEnhancer

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


class Pipeline(Counterparts, PipelineFolder, LoraMixin, OffloadMixin):
    """Components, `from_pretrained`, `save_pretrained`, `to`, and the seconds of each stage of the last call.

    A part may be None; what needs it says so.
    """

    # The components, with library and class as in model_index.json.
    parts: ClassVar[dict[str, list[str]]] = _PARTS
    # Whether the vision tower of the condition encoder is loaded.
    uses_vision = False
    encodes_pictures = True  # by the VAE
    # Whether it is loaded with its language-model head, to write captions.
    writes_captions = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = hinted(cls.__call__)  # type: ignore[method-assign,attr-defined]

    def __init__(self, scheduler, vae, text_encoder, tokenizer, transformer, *, free_modulation_weights: bool = False):
        if type(transformer).__module__.startswith("diffusers."):
            raise TypeError(
                "transformer must be this package's QwenImageTransformer2DModel, got diffusers' own: read it with "
                "QwenImageTransformer2DModel.from_pretrained, or speed up the diffusers pipeline with accelerate(pipe)"
            )
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
        # Told the name of each stage of a call as it begins.
        self.on_stage: Callable[[str], None] | None = None
        self._read = {}

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.parts}

    @property
    def device(self) -> torch.device:
        """Of the transformer, or of the first model that there is."""
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @property
    def _first(self) -> Any:
        if not self._modules:
            raise ValueError(f"{type(self).__name__} must have a model to have a device and a dtype, got none")
        return self._modules[0]

    def to(self, *args, silence_dtype_warnings: bool = True, **kwargs):
        """Move or cast all models, as `torch.nn.Module.to`; returns the pipeline. No dtype warns here, so that
        `silence_dtype_warnings` is always kept. ValueError for a GPU where torch sees none."""
        for device in (*args[:1], kwargs.get("device")):
            if isinstance(device, (str, torch.device)):
                check_visible("to", device)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        for part in self._modules:
            here = part.device if device is None or device.index is not None else torch.device(part.device.type)
            stays = device in (None, here) and dtype in (None, part.dtype)
            if getattr(part, "streamed", None) is None or not stays:
                part.to(*args, **kwargs)
        return self

    def enable_cuda_graphs(self, limit: int = 4, lengths: Lengths = "auto") -> None:
        """Capture the transformer's pass once for a shape (image sizes and text lengths) and replay it from then on.

        The first step of a new shape takes the time of a few. Up to `limit` shapes share the working memory of the
        largest; with one more, all are captured anew as they come. So they are where weights or LoRAs changed in a
        way that a graph does not see; a new schedule needs no new graph.

        Args:
            limit: shapes that are kept.
            lengths: of text that a graph serves. "any": all up to the next multiple of 64 tokens, by attention that
                reads lengths on the GPU; "one": a new length is a new shape. "auto": any where such attention is the
                fastest. On Hopper, images of 1408 tokens and more (24 heads) have one length to a graph, because
                cuDNN is faster, unless FlashAttention-3 is activated for torch. For many prompts and few steps, "any"
                may be worth it there. `qwen-image-fast doctor` says what "auto" does.

        Raises:
            ValueError: the transformer is not on a CUDA device, or streamed, or not alone; `limit` or `lengths` is
                none of those.
        """
        device = self.transformer.proj_out.weight.device
        if device.type != "cuda":
            raise ValueError(f"enable_cuda_graphs: the transformer must be on cuda, got {device}")
        if self.transformer.streamed is not None:
            raise ValueError(
                "enable_cuda_graphs: the transformer must be in memory as a whole, and its blocks are streamed"
            )
        if self.transformer.ranks is not None:
            raise ValueError("enable_cuda_graphs: the transformer must compute alone, call disable_parallel() first")
        self.cuda_graphs = StepGraphs(limit, lengths=lengths)

    def disable_cuda_graphs(self) -> None:
        """Run passes one kernel after another again, and free the graphs' memory."""
        self.cuda_graphs = None

    def enable_parallel(self, parallel: str | Mapping[str, int] | Split = "auto", timeout: float = 600.0) -> None:
        """Let the processes that torchrun started make each picture together; every one makes the same calls.

        All of them get the pictures. The branches of guidance are computed with the same bits as by one process, tokens
        equal up to rounding; the VAE's tiles, where tiling is enabled, with the same bits. Pipelines around the same
        models do so too. Not yet run on GPUs; see docs/distributed.md.

        Args:
            parallel: how many groups share the branches, and how many processes of each the tokens:
                "guidance=2,ulysses=4" or such a mapping; "auto": the branches first.
            timeout: seconds after which the others' absence is an error.

        Raises:
            ValueError: there is one process alone; the numbers do not fit it or the model; CUDA graphs are enabled.
        """
        if self.cuda_graphs is not None:
            raise ValueError("enable_parallel: CUDA graphs must be off, call disable_cuda_graphs() first")
        self._need("transformer", "nothing can be computed together")
        ranks = start_ranks("enable_parallel", parallel, self.transformer, timeout)
        self.transformer.ranks = ranks
        if self.vae is not None:
            self.vae.ranks = ranks

    def disable_parallel(self) -> None:
        """Let every process compute by itself again."""
        for part in (self.transformer, self.vae):
            if part is not None:
                part.ranks = None

    @property
    def _modules(self) -> list[Any]:
        """The models that there are, some of which a pipeline may have several of."""
        return [part for part in (self.transformer, self.vae, self.text_encoder) if part is not None]

    @property
    def vae_scale_factor(self) -> int:
        return 8 if self.vae is None else 2 ** len(self.vae.temperal_downsample)

    def _need(self, name: str, what: str) -> Any:
        """A part without which `what` is not possible."""
        part = getattr(self, name)
        if part is None:
            raise ValueError(f"{what}: this {type(self).__name__} was made with {name}=None")
        return part

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to `times[name]`."""
        if self.on_stage is not None:
            self.on_stage(name)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start
