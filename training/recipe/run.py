"""What every run has: steps, batch, who makes the batches, optimiser, checkpoints, log, parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import must, must_be_at_least

BACKENDS = ("here", "processes", "ray")


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

    def check(self) -> None:
        must(self.backend in BACKENDS, "producers.backend", f"be of {', '.join(BACKENDS)}", self.backend)
        must_be_at_least(1, "producers.count", self.count)
        must_be_at_least(1, "producers.ahead", self.ahead)


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

    def check(self) -> None:
        must(self.name in ("adamw", "muon"), "optimizer.name", "be adamw or muon", self.name)
        must(self.schedule in ("constant", "cosine"), "optimizer.schedule", "be constant or cosine", self.schedule)
        must(self.lr > 0, "optimizer.lr", "be above 0", self.lr)
        must(0 <= self.ema < 1, "optimizer.ema", "be in [0, 1)", self.ema)
        must(len(self.betas) == 2, "optimizer.betas", "be two numbers", self.betas)
        must_be_at_least(0, "optimizer.warmup", self.warmup)


@dataclass
class CheckpointRecipe:
    every: int = 500
    keep: int = 2

    def check(self) -> None:
        must_be_at_least(1, "checkpoint.every", self.every)
        must_be_at_least(1, "checkpoint.keep", self.keep)


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

    def check(self) -> None:
        must_be_at_least(1, "log.every", self.every)
        must_be_at_least(1, "log.sample_steps", self.sample_steps)


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

    def check(self) -> None:
        for name, least in (("dp_replicate", 1), ("dp_shard", 0), ("tp", 1), ("cp", 1), ("timeout", 1)):
            must_be_at_least(least, f"parallel.{name}", getattr(self, name))


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

    def check(self) -> None:
        """Everything that can be known before a model is loaded; RecipeError with one sentence."""
        for name in ("steps", "batch", "accumulate"):
            must_be_at_least(1, name, getattr(self, name))
        for group in (self.data, self.producers, self.optimizer, self.checkpoint, self.parallel, self.log):
            group.check()
