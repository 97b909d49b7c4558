"""What every run has: steps, batch, who makes the batches, optimiser, checkpoints, log, parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_image_fast.training.recipe.data import DataRecipe
from qwen_image_fast.training.recipe.fields import must, must_be_at_least

BACKENDS = ("here", "processes", "ray")
OPTIMIZERS = ("adamw", "muon", "adamw8bit", "adafactor", "prodigy")
SCHEDULES = ("constant", "cosine", "cosine-restarts")


@dataclass
class ProducersRecipe:
    """Who makes the batches. backend: here, the process that trains; processes of this machine, with shared memory; or
    ray, actors of a cluster. The batches and their order are the same.

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
    """name: "adamw"; "muon", matrices of the transformer blocks by torch.optim.Muon and everything else by AdamW;
    "adamw8bit", states in 8 bits, of bitsandbytes; "adafactor", a factored second moment, of transformers; "prodigy",
    which finds the learning rate, so that lr is 1, of prodigyopt. The last three by one process.

    lr: of a step at its highest. betas, eps, weight_decay: of the optimiser; the decay of matrices alone. clip: the
    norm that all gradients together may have; 0: any. schedule: "constant", "cosine" (to `final_lr` times lr) or
    "cosine-restarts", all after the warm-up. cycles: of cosine-restarts. warmup: steps in which lr rises linearly.
    final_lr: where a cosine ends, as a share of lr. ema: share of the average of the weights that a step keeps; 0: the
    weights themselves.

    masters: "float32", weights beside those of 16 bits that take the updates; "none", the updates are rounded into the
    16-bit weights stochastically, with AdamW, by one process: 4 bytes less for each.
    """

    name: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: str = "constant"
    cycles: int = 1
    warmup: int = 0
    final_lr: float = 0.0
    ema: float = 0.998
    masters: str = "float32"

    def check(self) -> None:
        must(self.name in OPTIMIZERS, "optimizer.name", f"be of {', '.join(OPTIMIZERS)}", self.name)
        must(self.schedule in SCHEDULES, "optimizer.schedule", f"be of {', '.join(SCHEDULES)}", self.schedule)
        must_be_at_least(1, "optimizer.cycles", self.cycles)
        must(self.cycles == 1 or self.schedule == "cosine-restarts", "optimizer.cycles",
             "be 1 unless optimizer.schedule is cosine-restarts", self.cycles)  # fmt: skip
        must(self.masters in ("float32", "none"), "optimizer.masters", "be float32 or none", self.masters)
        must(self.masters == "float32" or self.name == "adamw", "optimizer.masters",
             f"be float32 with {self.name}: adamw alone rounds stochastically", self.masters)  # fmt: skip
        must(self.lr > 0, "optimizer.lr", "be above 0", self.lr)
        must(0 <= self.ema < 1, "optimizer.ema", "be in [0, 1)", self.ema)
        must(len(self.betas) == 2, "optimizer.betas", "be two numbers", self.betas)
        must_be_at_least(0, "optimizer.warmup", self.warmup)


@dataclass
class CheckpointRecipe:
    """every: steps between checkpoints. keep: how many of the newest stay."""

    every: int = 500
    keep: int = 2

    def check(self) -> None:
        must_be_at_least(1, "checkpoint.every", self.every)
        must_be_at_least(1, "checkpoint.keep", self.keep)


@dataclass
class LogRecipe:
    """every: steps between log lines. validate_every, sample_every: steps between validations, and between sample
    pictures; 0: never. validation_samples: of each noise level.

    ocr_samples: held-out captions of the synthesis source that are drawn and read back at each validation. prompts: of
    the sample pictures; empty: captions that are held out. sample_count: pictures without prompts, and edits.
    sample_steps, guidance: of the sample pictures; 0: what the model makes best.
    """

    every: int = 10
    validate_every: int = 0
    validation_samples: int = 16
    ocr_samples: int = 0
    sample_every: int = 0
    prompts: list[str] = field(default_factory=list)
    sample_count: int = 8
    sample_steps: int = 0
    guidance: float = 0.0

    def check(self) -> None:
        must_be_at_least(1, "log.every", self.every)
        must_be_at_least(0, "log.sample_steps", self.sample_steps)
        must_be_at_least(0, "log.guidance", self.guidance)
        must_be_at_least(1, "log.sample_count", self.sample_count)


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
    """What every run has.

    kind: flow, the transformer; vae; or what comes after training: sft, dpo, grpo, nft, awm. name: of the run, in what
    it says. seed: of everything that is drawn. steps: updates. batch: samples of a micro-batch. accumulate:
    micro-batches of a step. device: cpu, cuda, cuda:1 or auto. reference_ops: run the PyTorch references of the fused
    ops, on a device that has no kernels.
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

    @property
    def names_data(self) -> bool:
        """Whether `data` must name a source."""
        return True

    def check(self) -> None:
        """Everything that can be known before a model is loaded; RecipeError with one sentence."""
        for name in ("steps", "batch", "accumulate"):
            must_be_at_least(1, name, getattr(self, name))
        for group in (self.data, self.producers, self.optimizer, self.checkpoint, self.parallel, self.log):
            group.check()
