"""Runs of kind flow: the transformer, all of it or adapters, with or without the condition encoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_fast.sizes import parse_bytes
from qwen_image_fast.training.recipe.fields import RecipeError, must, must_be_at_least
from qwen_image_fast.training.recipe.run import RunRecipe

ADAPTERS = ("lora", "dora", "lokr")
TYPES = ("auto", "float32", "bfloat16")
LEVELS = ("logit-normal", "uniform", "shifted", "resolution")
NEW = "new"


@dataclass
class ModelRecipe:
    """folder: the diffusers-layout pipeline to start from: a folder, "tiny" (the one that comes with the package) or
    the name of a hub repository; "new": one of tiny's shape with random weights.

    vae: a VAE, or a pipeline's, instead of that of `folder`. dtype: of the weights in the forward pass; "auto" is
    bfloat16 on CUDA, float32 on the CPU. The optimiser's weights are always float32. train_text_encoder: whether it
    learns too, as that of tiny did. max_text_tokens: of a caption, which is cut behind them; an edit's instruction is
    never cut, a longer one is named in a warning. gradient_checkpointing: less memory for a third more time. compile:
    by torch.compile.

    precision: "int8" or "int4", the large frozen weights below adapters in 8 or 4 bits, an approximation; empty: in
    `dtype`. memory:
    with it, bytes such as "24GB" that the run may hold on its device: modulation and the condition encoder, where they
    do not fit, are read when they are used, from the machine's memory or the disk; empty: all that there is.
    """

    folder: str = ""
    vae: str = ""
    dtype: str = "auto"
    train_text_encoder: bool = True
    max_text_tokens: int = 256
    gradient_checkpointing: bool = False
    compile: bool = False
    precision: str = ""
    memory: str = ""

    def check(self, lora: LoraRecipe) -> None:
        must(self.dtype in TYPES, "model.dtype", f"be {', '.join(TYPES[:-1])} or {TYPES[-1]}", self.dtype)
        must(not (lora.rank and self.train_text_encoder), "model.train_text_encoder",
             "be false where lora.rank is above 0", True)  # fmt: skip
        must(self.precision in ("", "int8", "int4"), "model.precision", "be int8, int4 or left out", self.precision)
        if self.precision:
            must(lora.rank > 0, "lora.rank", "be above 0 with model.precision: adapters alone learn then", lora.rank)
            must(lora.kind != "dora", "lora.kind", "be lora or lokr with model.precision: DoRA needs whole weights",
                 lora.kind)  # fmt: skip
            must(not self.compile, "model.compile", "be false with model.precision", True)
        if self.memory:
            must(bool(self.precision), "model.memory", "be left out without model.precision: blocks whose weights come "
                 "and go have no gradients", self.memory)  # fmt: skip
            try:
                parse_bytes(self.memory, "recipe: model.memory")
            except ValueError as error:
                raise RecipeError(str(error)) from error

    @property
    def start(self) -> str:
        """`folder`, empty for a new model."""
        return "" if self.folder == NEW else self.folder


@dataclass
class LoraRecipe:
    """rank: of the adapters; 0: none, all weights learn. alpha: the adapters count alpha / rank. kind: "lora"; "dora",
    with a magnitude for each row of the weight; "lokr", Kronecker products. factor: of "lokr", the most rows and
    columns of the first matrix; 0: the root of the layer's.

    targets: the linear layers of the transformer that get an adapter: "attention", "mlp", "modulation" (of the image
    stream), "text" (all of the text stream), "all", or ends of their names, with * for any letters. ranks, alphas: of
    layers, by the same patterns, where they are not `rank` and `alpha`; of several that fit, the last.

    rank_stabilised: the adapters count alpha / sqrt(rank) instead. dropout: share of the rank that a micro-batch does
    without.
    """

    rank: int = 0
    alpha: float = 16.0
    kind: str = "lora"
    factor: int = 0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    dropout: float = 0.0

    def check(self) -> None:
        must_be_at_least(0, "lora.rank", self.rank)
        must(self.kind in ADAPTERS, "lora.kind", f"be of {', '.join(ADAPTERS)}", self.kind)
        must(0 <= self.dropout < 1, "lora.dropout", "be in [0, 1)", self.dropout)
        must_be_at_least(0, "lora.factor", self.factor)
        must(not self.factor or self.kind == "lokr", "lora.factor", "be 0 unless lora.kind is lokr", self.factor)
        for pattern, rank in self.ranks.items():
            must_be_at_least(1, f"lora.ranks.{pattern}", rank)


@dataclass
class SigmaRecipe:
    """Noise levels, 0 for the picture and 1 for noise. name: "logit-normal", sigmoid(mean + std n) with n standard
    normal; "uniform"; "shifted", uniform and then s u / (1 + (s - 1) u) with s = `shift`; "resolution", the same with
    the shift that inference has for a picture of that size. mean, std: of logit-normal. shift: of shifted.

    weighting: "none", or "min-snr", the loss counts min((1 - sigma)^2, gamma sigma^2) (arXiv 2303.09556). gamma: its
    limit of the ratio of signal to noise.
    """

    name: str = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    weighting: str = "none"
    gamma: float = 5.0

    def check(self) -> None:
        must(self.name in LEVELS, "sigma.name", f"be of {', '.join(LEVELS)}", self.name)
        must(self.weighting in ("none", "min-snr"), "sigma.weighting", "be none or min-snr", self.weighting)
        must(self.std > 0, "sigma.std", "be above 0", self.std)
        must(self.gamma > 0, "sigma.gamma", "be above 0", self.gamma)
        must(self.shift > 0, "sigma.shift", "be above 0", self.shift)
        for field_name, default, of in (("mean", 0.0, "logit-normal"), ("std", 1.0, "logit-normal"),
                                        ("shift", 1.0, "shifted")):  # fmt: skip
            value = getattr(self, field_name)
            must(value == default or self.name == of, f"sigma.{field_name}",
                 f"be left out where sigma.name is {self.name}: it is of {of}", value)  # fmt: skip
        must(self.gamma == 5.0 or self.weighting != "none", "sigma.gamma", "be left out without min-snr", self.gamma)


@dataclass
class FlowRecipe(RunRecipe):
    model: ModelRecipe = field(default_factory=ModelRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    sigma: SigmaRecipe = field(default_factory=SigmaRecipe)

    def check(self) -> None:
        super().check()
        self.sigma.check()
        must(self.optimizer.masters == "float32" or not self.lora.rank, "optimizer.masters",
             "be float32 for adapters, which are float32 themselves", self.optimizer.masters)  # fmt: skip
        first = self.data.parts[0].source
        must(not self.log.ocr_samples or first == "synthesis", "log.ocr_samples",
             "be 0 unless the first data.source is synthesis", self.log.ocr_samples)  # fmt: skip
        keep = [part.name for part in self.data.parts if part.keep]
        must(
            not keep or (self.lora.rank > 0 and self.kind == "flow"),
            "data.mixture.keep",
            "be false but for adapters (lora.rank above 0) of kind flow: without them the model is what it was",
            keep,
        )
        self.lora.check()
        self.model.check(self.lora)
