"""Recipes: what a training run does, as YAML with dataclasses behind it and dotted overrides on the command line.

A file says `kind: flow` or `kind: vae`; every other key is a field of that dataclass or of one inside it (`fields.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_image_fast.training.recipe.fields import RecipeError, convert, read_tree


@dataclass
class PartRecipe:
    """A part of a mixture. weight: its share of the samples, of all parts' weights. source, options, filters: as in
    `DataRecipe`. tasks: its own; empty: those of the mixture. name: in `mixture.yaml`; empty: the source.
    """

    name: str = ""
    weight: float = 1.0
    source: str = "squares"
    options: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataRecipe:
    """source: "squares" (a toy), "synthesis" (training.synthesis), shards that `data filter` wrote (the folder with
    index.parquet), or a folder of images with captions in `<name>.txt`.

    options: arguments of the source. mixture: several sources, instead of one. filters: fields of the recipe of
    `data filter` (`training/data/recipe.py`); what pictures of shards and folders must pass while the run goes on.
    buckets: allowed [height, width] in pixels; an image goes to the one of the nearest aspect ratio. tasks: weights of
    t2i (text to image), ti2i (references and an instruction) and recon (the reference is the image). text_dropout:
    share of samples whose caption becomes "". cache: folder of latents made by
    `training.batches.latents`; empty: encode on the fly.
    """

    source: str = "squares"
    options: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    mixture: list[PartRecipe] = field(default_factory=list)
    buckets: list[list[int]] = field(default_factory=lambda: [[64, 64]])
    tasks: dict[str, float] = field(default_factory=lambda: {"t2i": 1.0})
    text_dropout: float = 0.1
    cache: str = ""

    @property
    def parts(self) -> list[PartRecipe]:
        """The mixture, every part named; a single source is a mixture of one."""
        one = PartRecipe(source=self.source, options=self.options, filters=self.filters)
        parts = self.mixture or [one]
        return [dataclasses.replace(p, name=p.name or p.source, tasks=p.tasks or self.tasks) for p in parts]


@dataclass
class ProducersRecipe:
    """Who makes the batches. backend: "here", the process that trains; "processes" of this machine, with shared memory;
    "ray", actors of a cluster. The batches and their order are the same.

    count: processes or actors. ahead: micro-batches made ahead of the one in use, at most. encode: they also run the
    VAE, and the condition encoder unless it learns. device: of these; "auto": that of the run. cpus, gpus: of a Ray
    actor. address: of a Ray cluster; empty: the one of the environment, or one on this machine.
    """

    backend: str = "here"
    count: int = 1
    ahead: int = 4
    encode: bool = True
    device: str = "auto"
    cpus: float = 1.0
    gpus: float = 0.0
    address: str = ""


@dataclass
class ModelRecipe:
    """folder: the diffusers-layout pipeline to start from; empty: the tiny model with random weights.

    vae: a VAE folder instead of that of `folder`. dtype: of the weights in the forward pass; "auto" is bfloat16 on
    CUDA, float32 on the CPU. The optimiser's weights are always float32.
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
class OptimizerRecipe:
    """schedule: "constant" or "cosine" (to `final_lr` times lr), both after a linear warm-up. clip 0: no clipping.

    name "muon": matrices of the transformer blocks by torch.optim.Muon, everything else by AdamW.
    """

    name: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: str = "constant"
    warmup: int = 0
    final_lr: float = 0.0
    ema: float = 0.998


@dataclass
class CheckpointRecipe:
    every: int = 500
    keep: int = 2


@dataclass
class LogRecipe:
    """Steps between log lines, validations and sample grids (0: never). prompts, sample_steps: of the grids.

    ocr_samples: held-out captions of the synthesis source that are drawn and read back at each validation.
    """

    every: int = 10
    validate_every: int = 0
    validation_samples: int = 16
    ocr_samples: int = 0
    sample_every: int = 0
    sample_steps: int = 20
    prompts: list[str] = field(default_factory=list)


@dataclass
class ParallelRecipe:
    """Processes of each kind of parallelism; their product is the number of processes that torchrun starts.

    dp_replicate: copies of the sharded model. dp_shard: processes over which weights and optimiser states are split;
    0: all that the others leave. tp: of the heads of a layer. cp: of the tokens of a sample (Ulysses). tp x cp must
    divide the attention heads. timeout: seconds after which a silent rank counts as dead.
    """

    dp_replicate: int = 1
    dp_shard: int = 0
    tp: int = 1
    cp: int = 1
    timeout: float = 600.0


@dataclass
class VaeLossRecipe:
    """Reconstruction: MSE + l1 * L1. perceptual: its share of the gradient at the last layer; 0: none.

    latent_noise: deviation of the noise on the latents z. prior: weight of mean z^2 / 2, the part of the
    Kullback-Leibler divergence from N(0, 1) that a fixed deviation leaves; it keeps the noise from being outgrown.
    """

    l1: float = 0.1
    latent_noise: float = 0.05
    prior: float = 0.0
    perceptual: float = 0.0


@dataclass
class RunRecipe:
    """What every run has. batch: samples of a micro-batch; accumulate: micro-batches of a step.

    reference_ops: run the PyTorch references of the fused ops, on a device that has no kernels.
    """

    kind: str = "flow"
    name: str = "run"
    seed: int = 0
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    device: str = "auto"
    reference_ops: bool = False
    data: DataRecipe = field(default_factory=DataRecipe)
    producers: ProducersRecipe = field(default_factory=ProducersRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)


@dataclass
class FlowRecipe(RunRecipe):
    model: ModelRecipe = field(default_factory=ModelRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    sigma: SigmaRecipe = field(default_factory=SigmaRecipe)


@dataclass
class VaeRecipe(RunRecipe):
    """mode "scratch": a new VAE; "decoder": the decoder of `folder`, its encoder frozen.

    crop: side in pixels of the random square of each image that is used, a multiple of 8; 0: the whole image.
    statistics: images of which the latents' mean and deviation are measured at the end ("scratch").
    """

    kind: str = "vae"
    mode: str = "scratch"
    folder: str = ""
    base_dim: int = 8
    crop: int = 0
    statistics: int = 256
    loss: VaeLossRecipe = field(default_factory=VaeLossRecipe)


KINDS: dict[str, type[RunRecipe]] = {"flow": FlowRecipe, "vae": VaeRecipe}
TASKS = ("t2i", "ti2i", "recon")
BACKENDS = ("here", "processes", "ray")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunRecipe:
    """The recipe in a YAML file, changed by overrides of the form "optimizer.lr=1e-3", values in YAML."""
    return build(read_tree(path, overrides))


def build(tree: Any) -> RunRecipe:
    """The checked recipe of a nested dict."""
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe: the file must hold keys and values, got {type(tree).__name__}")
    kind = tree.get("kind", "flow")
    if kind not in KINDS:
        raise RecipeError(f"recipe: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    recipe = convert(tree, KINDS[kind], "")
    validate(recipe)
    return recipe


def to_dict(recipe: RunRecipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def validate(recipe: RunRecipe) -> None:
    """Everything that can be known before a model is loaded; RecipeError with one sentence."""
    optimizer, data = recipe.optimizer, recipe.data
    for name, value, least in (
        ("steps", recipe.steps, 1), ("batch", recipe.batch, 1), ("accumulate", recipe.accumulate, 1),
        ("checkpoint.every", recipe.checkpoint.every, 1), ("checkpoint.keep", recipe.checkpoint.keep, 1),
        ("log.every", recipe.log.every, 1), ("log.sample_steps", recipe.log.sample_steps, 1),
        ("optimizer.warmup", optimizer.warmup, 0),
        ("producers.count", recipe.producers.count, 1), ("producers.ahead", recipe.producers.ahead, 1),
        ("parallel.dp_replicate", recipe.parallel.dp_replicate, 1), ("parallel.dp_shard", recipe.parallel.dp_shard, 0),
        ("parallel.tp", recipe.parallel.tp, 1), ("parallel.cp", recipe.parallel.cp, 1),
        ("parallel.timeout", recipe.parallel.timeout, 1),
    ):  # fmt: skip
        _must(value >= least, name, f"be at least {least}", value)
    _must(optimizer.name in ("adamw", "muon"), "optimizer.name", "be adamw or muon", optimizer.name)
    _must(optimizer.schedule in ("constant", "cosine"), "optimizer.schedule", "be constant or cosine",
          optimizer.schedule)  # fmt: skip
    _must(optimizer.lr > 0, "optimizer.lr", "be above 0", optimizer.lr)
    _must(0 <= optimizer.ema < 1, "optimizer.ema", "be in [0, 1)", optimizer.ema)
    _must(len(optimizer.betas) == 2, "optimizer.betas", "be two numbers", optimizer.betas)
    _must(0 <= data.text_dropout <= 1, "data.text_dropout", "be in [0, 1]", data.text_dropout)
    _must(bool(data.buckets), "data.buckets", "name at least one [height, width]", data.buckets)
    for bucket in data.buckets:
        ok = len(bucket) == 2 and all(side > 0 and side % 16 == 0 for side in bucket)
        _must(ok, "data.buckets", "hold [height, width] in multiples of 16 pixels", bucket)
    backend, names = recipe.producers.backend, [part.name for part in data.parts]
    _must(backend in BACKENDS, "producers.backend", f"be of {', '.join(BACKENDS)}", backend)
    _must(not (data.mixture and data.cache), "data.cache", "be empty where there is a mixture", data.cache)
    _must(len(set(names)) == len(names), "data.mixture", "have parts of different names", names)
    _check_weights("data.mixture", {part.name: part.weight for part in data.parts})
    for part in data.parts:
        for task in part.tasks:
            _must(task in TASKS, "data.tasks", f"be of {', '.join(TASKS)}", task)
        _check_weights("data.tasks", part.tasks)
    if isinstance(recipe, FlowRecipe):
        _must(not recipe.log.ocr_samples or data.parts[0].source == "synthesis", "log.ocr_samples",
              "be 0 unless the first data.source is synthesis", recipe.log.ocr_samples)  # fmt: skip
        _must(recipe.model.dtype in ("auto", "float32", "bfloat16"), "model.dtype",
              "be auto, float32 or bfloat16", recipe.model.dtype)  # fmt: skip
        _must(recipe.lora.rank >= 0, "lora.rank", "be at least 0", recipe.lora.rank)
        _must(not (recipe.lora.rank and recipe.model.train_text_encoder), "model.train_text_encoder",
              "be false where lora.rank is above 0", True)  # fmt: skip
    if isinstance(recipe, VaeRecipe):
        _must(not (data.mixture or data.filters), "data.mixture", "be empty, as data.filters, for kind vae", names)
        _must(recipe.mode in ("scratch", "decoder"), "mode", "be scratch or decoder", recipe.mode)
        least = min(side for bucket in data.buckets for side in bucket)
        _must(0 <= recipe.crop <= least and recipe.crop % 8 == 0, "crop",
              f"be a multiple of 8 up to the smallest side, {least}", recipe.crop)  # fmt: skip
        _must(recipe.mode == "scratch" or bool(recipe.folder), "folder", "name a VAE for mode decoder", recipe.folder)


def _must(condition: bool, name: str, rule: str, value: Any) -> None:
    if not condition:
        raise RecipeError(f"recipe: {name} must {rule}, got {value!r}")


def _check_weights(name: str, weights: dict[str, float]) -> None:
    ok = sum(weights.values()) > 0 and min(weights.values()) >= 0
    _must(ok, name, "have weights of at least 0, one above 0", weights)
