"""Runs of kind flow: the transformer, all of it or adapters, with or without the condition encoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_fast.training.recipe.fields import must, must_be_at_least
from qwen_image_fast.training.recipe.run import RunRecipe


@dataclass
class ModelRecipe:
    """folder: the diffusers-layout pipeline to start from: a folder, "tiny" (the one that comes with the package) or
    the name of a hub repository; empty: the tiny model with random weights.

    vae: a VAE, or a pipeline's, instead of that of `folder`. dtype: of the weights in the forward pass; "auto" is
    bfloat16 on CUDA, float32 on the CPU. The optimiser's weights are always float32.
    """

    folder: str = ""
    vae: str = ""
    dtype: str = "auto"
    train_text_encoder: bool = True
    max_text_tokens: int = 256
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass
class LoraRecipe:
    """rank 0: full tuning. targets: ends of the names of the linear layers of the transformer that get an adapter."""

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class SigmaRecipe:
    """Noise levels: sigma = sigmoid(mean + std * n), n standard normal."""

    mean: float = 0.0
    std: float = 1.0


@dataclass
class FlowRecipe(RunRecipe):
    model: ModelRecipe = field(default_factory=ModelRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    sigma: SigmaRecipe = field(default_factory=SigmaRecipe)

    def check(self) -> None:
        super().check()
        first = self.data.parts[0].source
        must(not self.log.ocr_samples or first == "synthesis", "log.ocr_samples",
             "be 0 unless the first data.source is synthesis", self.log.ocr_samples)  # fmt: skip
        types = ("auto", "float32", "bfloat16")
        must(self.model.dtype in types, "model.dtype", "be auto, float32 or bfloat16", self.model.dtype)
        must_be_at_least(0, "lora.rank", self.lora.rank)
        must(not (self.lora.rank and self.model.train_text_encoder), "model.train_text_encoder",
             "be false where lora.rank is above 0", True)  # fmt: skip
