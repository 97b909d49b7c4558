"""What a run on many GPUs will need, from sizes alone: memory per rank, communication and time of a step.

The model, per micro-batch (P: weights of a rank's tensor-parallel part, S = dp_shard x cp, R = dp_replicate):

    states      20 P / S bytes: float32 weights, gradients, two moments, average; with adapters those are of A alone,
                their parameters, and the weights are 2 P / S; with `model.precision` the large ones take a byte, in 4
                bits 9 / 16 of one, and with `model.memory` the modulation is not among them
    gathered    two units of weights in 16 bit, one of gradients in 16 and in 32 bit, and the root in 16 bit; of the
                frozen weights below adapters nothing on a single GPU
    activations `memory.estimate`'s count for each token of the rank; of the 22 values 15 are split by tp
    FSDP        (2 + 2 + 4) P (S - 1) / S bytes: weights gathered twice in 16 bit, gradients scattered in 32 bit;
                and 8 P / S (R - 1) / R for the all-reduce of replicas; gradients of adapters alone are 4 A and 8 A
    TP          for each block and stream 4 all-reduces of tokens x width x 2 bytes, each 2 (tp - 1) / tp of that
    Ulysses     for each block 8 exchanges (q, k, v, output; forward, backward) of (cp - 1) / cp of tokens x width x 2
    compute     `flops.step_flops` / (peak x assumed MFU)

With `model.memory` of the frozen models the embedding and the VAE are always there, and two buffers of a layer.
Recomputing activations adds a third to the compute and half as much again to TP and Ulysses. FSDP runs beside the
compute, TP and Ulysses wait: time = max(compute + TP + Ulysses, FSDP). A group of ranks that fits into a machine of
8 GPUs talks at NVLink's speed, a larger one at the network's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qwen_image_fast.folders import local_folder, nearest
from qwen_image_fast.models.precision import PRECISIONS, int8_layers, mean_bytes
from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
from qwen_image_fast.training.engine.memory import adapter_weights, references_of, tokens_of_batch, transformer_config
from qwen_image_fast.training.parallel.layout import Sizes, check_recipe_parallel, sizes_of
from qwen_image_fast.training.recipe.curriculum import Curriculum
from qwen_image_fast.training.recipe.fields import RecipeError
from qwen_image_fast.training.recipe.flow import FlowRecipe
from qwen_image_fast.training.recipe.run import RunRecipe
from qwen_image_fast.training.tasks.flops import PEAK_TFLOPS, step_flops

# Assumptions. Bytes per second of a GPU to the others: NVLink 4 and 400 Gb/s InfiniBand, at about 70 % of their peaks.
NVLINK, NETWORK, MACHINE = 300e9, 35e9, 8
MFU = 0.4
RELEASED = "Qwen/Qwen-Image"  # how the names of the released models begin: all have the same transformer
# Bytes of what every rank holds besides: the released Qwen2.5-VL-7B and VAE in 16 bit, frozen; CUDA and NCCL.
FROZEN, RUNTIME = 16.6e9 + 0.3e9, 3e9
# What of it stays where the rest is read when it is used: the embedding, the VAE in float32, two buffers of a layer of
# the encoder; and a process of its own.
FROZEN_STAYS, RUNTIME_ALONE = 1.1e9 + 0.6e9 + 2 * 0.47e9, 1.5e9
PCIE = 25e9  # bytes per second from the machine's memory
KEPT, KEPT_SPLIT = 22, 15


@dataclass(frozen=True)
class Model:
    """Weights of the transformer: all, of a block, of those what tp splits and the modulation, outside blocks, of its
    adapters, and those that can be in 8 bits."""

    config: Any
    total: int
    block: int
    block_split: int
    modulation: int
    root: int
    adapters: int
    small: int

    @property
    def width(self) -> int:
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def layers(self) -> int:
        return self.config["num_layers"]


@dataclass(frozen=True)
class Plan:
    """Of one layout. Bytes, bytes per step, seconds per step. changes: of the recipe, which the layout needs.
    streamed: bytes that come from the machine's memory for every micro-batch."""

    sizes: Sizes
    batch: int
    accumulate: int
    states: float
    gathered: float
    activations: float
    frozen: float
    fsdp_bytes: float
    tp_bytes: float
    cp_bytes: float
    compute_s: float
    fsdp_s: float
    tp_s: float
    cp_s: float
    streamed: float = 0.0
    changes: tuple[str, ...] = ()

    @property
    def memory(self) -> float:
        return self.states + self.gathered + self.activations + self.frozen

    @property
    def seconds(self) -> float:
        return max(self.compute_s + self.tp_s + self.cp_s, self.fsdp_s) + self.streamed * self.accumulate / PCIE

    @property
    def samples(self) -> int:
        return self.batch * self.accumulate


def model_of(recipe: FlowRecipe) -> Model:
    """Sizes of the recipe's transformer. Without a folder, that of the released model, or with a text encoder that
    learns too, the tiny one. A released one by its
    hub name has known sizes, before it is downloaded."""
    released = not recipe.model.start and not recipe.model.train_text_encoder
    released = released or counted_as_released(recipe)
    with torch.device("meta"):
        if released:
            transformer = QwenImageTransformer2DModel()
        else:
            transformer = QwenImageTransformer2DModel.from_config(transformer_config(recipe))
    block = transformer.transformer_blocks[0]
    sizes = {name: p.numel() for name, p in block.named_parameters()}
    kept_whole = ("norm", "mod.", "to_out.0.bias", "to_add_out.bias", "net.2.bias")
    split = sum(n for name, n in sizes.items() if not any(part in name for part in kept_whole))
    modulation = sum(n for name, n in sizes.items() if "mod." in name)
    total = sum(p.numel() for p in transformer.parameters())
    each = sum(sizes.values())
    root = total - each * len(transformer.transformer_blocks)
    small = sum(layer.weight.numel() for layer in int8_layers(transformer).values())
    adapters = adapter_weights(transformer, recipe.lora)
    return Model(transformer.config, total, each, split, modulation, root, adapters, small)


def counted_as_released(recipe: FlowRecipe) -> bool:
    """Whether a released model is named by its hub name: its sizes are known without a download."""
    name = recipe.model.start
    return name.startswith(RELEASED) and local_folder(name) is None


def plan_of(recipe: FlowRecipe, model: Model, sizes: Sizes, peak: float) -> Plan:
    """The plan of a layout. The samples of a step stay the recipe's where the ranks can share them."""
    per_rank = max(1, recipe.batch // sizes.dp)
    batch = per_rank * sizes.dp
    accumulate = max(1, round(recipe.batch * recipe.accumulate / batch))
    shards = sizes.dp_shard * sizes.cp
    layers, width, checkpointing = model.layers, model.width, recipe.model.gradient_checkpointing
    block = model.block - model.block_split * (1 - 1 / sizes.tp)
    weights = model.root + layers * block

    lora, learn = recipe.lora.rank > 0, model.adapters or weights
    tokens = tokens_of_batch(recipe, references_of(recipe.data)) / recipe.batch  # of a sample, the largest
    rows = per_rank * tokens / sizes.cp  # of a rank
    kept = KEPT - KEPT_SPLIT * (1 - 1 / sizes.tp)
    values = layers * 2 + kept if checkpointing else layers * kept
    unit = block - model.modulation
    frozen = _frozen(recipe) if not recipe.model.train_text_encoder else 0.0
    base, streamed, runtime = 2 * weights * lora, 0.0, RUNTIME
    if recipe.model.precision:
        base -= model.small * (2 - mean_bytes(recipe.model.precision, layers))
    if recipe.model.memory:
        of_modulation = 2.0 * model.modulation * layers
        stays = min(frozen, FROZEN_STAYS)
        base, streamed, runtime = base - of_modulation, of_modulation + frozen - stays, RUNTIME_ALONE
        frozen = stays

    again = 1.5 if checkpointing else 1.0
    messages = rows * width * 2 * layers * accumulate * again
    scattered = accumulate * (4 * weights + 4 * learn) * (shards - 1) / shards
    replicated = accumulate * 8 * learn / shards * (1 - 1 / sizes.dp_replicate)
    tp = messages * 4 * 2 * (sizes.tp - 1) / sizes.tp
    cp = messages * 8 / sizes.tp * (sizes.cp - 1) / sizes.cp
    text = recipe.model.max_text_tokens
    samples = per_rank * accumulate
    flops = step_flops(model.config, [int(tokens) - text] * samples, [text] * samples, adapters=lora)
    if checkpointing:  # the forward pass once more
        flops += step_flops(model.config, [int(tokens) - text] * samples, [text] * samples) / 3
    flops /= sizes.tp * sizes.cp

    def speed(ranks: int) -> float:
        return NVLINK if ranks <= MACHINE else NETWORK

    return Plan(
        sizes, batch, accumulate,
        states=(20 * learn + base) / shards,
        gathered=_gathered(unit, weights, model.root, shards, lora),
        activations=values * width * rows * 2,
        frozen=frozen + runtime,
        fsdp_bytes=scattered + replicated, tp_bytes=tp, cp_bytes=cp,
        compute_s=flops / (peak * MFU),
        fsdp_s=scattered / speed(shards * sizes.tp) + replicated / speed(sizes.world),
        tp_s=tp / speed(sizes.tp),
        cp_s=cp / speed(sizes.tp * sizes.cp),
        streamed=streamed,
    )  # fmt: skip


def _frozen(recipe: FlowRecipe) -> float:
    """Bytes of the condition encoder and the VAE: of a model that is here its files, else the released ones."""
    folder = local_folder(recipe.model.start) if recipe.model.start else None
    if folder is None:
        return FROZEN
    return sum(
        file.stat().st_size for part in ("text_encoder", "vae") for file in (folder / part).glob("*.safetensors")
    )


def _gathered(unit: float, weights: float, root: int, shards: int, lora: bool) -> float:
    if lora:
        return unit * 2 * 2 + root * 2 if shards > 1 else 0.0
    return unit * (2 * 2 + 2 + 4) + root * 2 if shards > 1 else weights * 2 + unit * 6


def layouts(gpus: int, heads: int) -> Iterator[Sizes]:
    """Every layout that uses all GPUs: tp within a machine, tp x cp dividing the heads."""
    for tp in _divisors(gpus):
        for cp in _divisors(gpus // tp):
            if heads % (tp * cp) or tp > MACHINE:
                continue
            dp = gpus // (tp * cp)
            for replicate in _divisors(dp):
                yield Sizes(replicate, dp // replicate, cp, tp)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def choose(recipe: RunRecipe, gpus: int, memory_gb: float, gpu: str) -> tuple[Model, list[Plan]]:
    """The layout that the recipe names, or all that fit, most samples per second first.

    Raises:
        RecipeError: the recipe's layout does not fit, or none does.
    """
    if not isinstance(recipe, FlowRecipe):
        raise RecipeError(f"plan: kind must be flow, got {recipe.kind!r}")
    gpu = known_gpu(gpu)
    if gpus < 1 or memory_gb <= 0:
        raise RecipeError(f"plan: --gpus and --memory must be above 0, got {gpus} and {memory_gb:g}")
    if recipe.model.precision and gpus > 1:
        raise RecipeError(f"plan: --gpus must be 1 with model.precision, got {gpus}")
    model, peak, named = model_of(recipe), PEAK_TFLOPS[gpu] * 1e12, recipe.parallel
    heads = model.config["num_attention_heads"]
    if named.dp_shard or max(named.dp_replicate, named.tp, named.cp) > 1:
        sizes = sizes_of(named, gpus)
        check_recipe_parallel(recipe, sizes, heads)
        found = [plan_of(recipe, model, sizes, peak)]
    else:
        possible = [sizes for sizes in layouts(gpus, heads) if not recipe.lora.rank or sizes.tp == 1]
        found = [plan_of(recipe, model, sizes, peak) for sizes in possible]
    fitting = [p for p in found if p.memory <= memory_gb * 1e9]
    if not fitting and gpus == 1 and in_fewer_bits(recipe):
        small = (_small(recipe, precision, memory_gb, peak) for precision in in_fewer_bits(recipe))
        fitting = [plan for plan in small if plan.memory <= memory_gb * 1e9][:1]
    if not fitting:
        least = min(found, key=lambda p: p.memory)
        raise RecipeError(
            f"plan: no layout fits into {gpus} x {memory_gb:g} GB: the least is {least.memory / 1e9:.1f} GB a GPU with "
            f"{least.sizes} ({_parts(least)}); {_advice(recipe, least, memory_gb)}"
        )
    # Layouts that keep the samples of a step first: others change what is learned.
    wanted = recipe.batch * recipe.accumulate
    return model, sorted(fitting, key=lambda p: (p.samples != wanted, p.seconds / p.samples, p.memory))


def frugal(recipe: FlowRecipe) -> list[str]:
    """Changes of a recipe that need less memory, of the same samples in a step."""
    return ["model.gradient_checkpointing=true", "batch=1", f"accumulate={recipe.batch * recipe.accumulate}"]


def in_fewer_bits(recipe: FlowRecipe) -> tuple[str, ...]:
    """Precisions that the base of a recipe's adapters could have, the exacter first; none where it has one."""
    return PRECISIONS if recipe.lora.rank and recipe.lora.kind != "dora" and not recipe.model.precision else ()


def small_base(precision: str, memory_gb: float) -> list[str]:
    """Changes of a recipe of adapters that need less than half of the memory: producers would hold encoders too."""
    return [f"model.precision={precision}", f"model.memory={memory_gb:g}GB", "producers.encode=false"]


def _small(recipe: FlowRecipe, precision: str, memory_gb: float, peak: float) -> Plan:
    """The plan of a recipe of adapters on one card with `small_base`, one sample at a time."""
    changed = {"gradient_checkpointing": True, "compile": False, "precision": precision, "memory": f"{memory_gb:g}GB"}
    model = replace(recipe.model, **changed)
    own = replace(recipe, batch=1, accumulate=recipe.batch * recipe.accumulate, model=model)
    changes = (*small_base(precision, memory_gb), "model.gradient_checkpointing=true")
    return replace(plan_of(own, model_of(own), Sizes(1, 1, 1, 1), peak), changes=changes)


def known_gpu(name: str) -> str:
    """The table's name of a GPU, however it is spaced: RTX4090 and rtx-4090 are RTX 4090."""
    plain = {re.sub(r"[^a-z0-9]", "", known.lower()): known for known in PEAK_TFLOPS}
    found = plain.get(re.sub(r"[^a-z0-9]|nvidia|geforce|amd", "", name.lower()))
    if found is None:
        raise RecipeError(
            f"plan: --gpu must be one of {', '.join(PEAK_TFLOPS)}, got {name!r}{nearest(name, PEAK_TFLOPS)}"
        )
    return found


def _advice(recipe: FlowRecipe, least: Plan, memory_gb: float) -> str:
    """What would need less, of what the recipe does not do already and where it can be enough."""
    advice = ["use more GPUs"]
    if least.memory - least.activations <= memory_gb * 1e9:
        advice += ["smaller data.buckets"]
        advice += [] if recipe.model.gradient_checkpointing else ["model.gradient_checkpointing"]
    advice += [] if recipe.lora.rank else ["adapters (lora.rank)"]
    return " or ".join([", ".join(advice[:-1]), advice[-1]]) if len(advice) > 1 else advice[0]


def _parts(plan: Plan) -> str:
    return (
        f"states {plan.states / 1e9:.1f}, gathered weights and gradients {plan.gathered / 1e9:.1f}, activations "
        f"{plan.activations / 1e9:.1f}, frozen models and runtime {plan.frozen / 1e9:.1f}"
    )


def print_plan(run: Curriculum, gpus: int, memory_gb: float, gpu: str, console: Console) -> None:
    """Of every stage the best layout in full and four others as lines; the assumptions."""
    gpu = known_gpu(gpu)
    stages = [(stage, *choose(stage.recipe, gpus, memory_gb, gpu)) for stage in run.stages]
    first, model = stages[0][0].recipe, stages[0][1]
    by_name = isinstance(first, FlowRecipe) and counted_as_released(first)
    console.print(
        f"{gpus} x {gpu}, {memory_gb:g} GB each; transformer of {model.total / 1e9:.2f} B parameters in {model.layers} "
        "blocks" + (f", those of {first.model.start} as released" if by_name else "")
    )
    for stage, _, plans in stages:
        if len(stages) > 1:
            console.print(f"\n{stage.name}, {stage.recipe.steps} steps", style="bold")
        _print_stage(stage.recipe, plans, console)
    console.print(
        f"assumed, not measured: {MFU:.0%} of {PEAK_TFLOPS[gpu]:g} TFLOP/s, {NVLINK / 1e9:.0f} GB/s within {MACHINE} "
        f"GPUs, {NETWORK / 1e9:.0f} GB/s between machines; formulas: training/parallel/plan.py"
    )
    if len(stages) > 1:
        console.print("all stages of a run have one layout: take one that fits in each")


def _print_stage(recipe: RunRecipe, plans: list[Plan], console: Console) -> None:
    best = plans[0]
    layout = "layout (dp_replicate x dp_shard x cp x tp)"
    table = Table(layout, "batch x accumulate", "GB a GPU", "s a step", "samples/s")
    for p in plans[:5]:
        s = p.sizes
        table.add_row(
            f"{s.dp_replicate} x {s.dp_shard} x {s.cp} x {s.tp}", f"{p.batch} x {p.accumulate}",
            f"{p.memory / 1e9:.1f}", f"{p.seconds:.2f}", f"{p.samples / p.seconds:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"memory a GPU of the first, GB: {_parts(best)}")
    console.print(
        f"sent by a GPU in a step, GB: FSDP {best.fsdp_bytes / 1e9:.1f}, tensor parallel {best.tp_bytes / 1e9:.1f}, "
        f"Ulysses {best.cp_bytes / 1e9:.1f}"
    )
    console.print(
        f"seconds of a step: compute {best.compute_s:.2f}, tensor parallel {best.tp_s:.2f}, Ulysses {best.cp_s:.2f}; "
        f"FSDP {best.fsdp_s:.2f} beside them"
    )
    s = best.sizes
    if best.streamed:
        console.print(
            f"from the machine's memory for every micro-batch, GB: {best.streamed / 1e9:.1f}, modulation and condition "
            f"encoder; {best.streamed / PCIE:.2f} s at {PCIE / 1e9:.0f} GB/s, assumed"
        )
    console.print(
        f"use it: parallel.dp_replicate={s.dp_replicate} parallel.dp_shard={s.dp_shard} parallel.cp={s.cp} "
        f"parallel.tp={s.tp} batch={best.batch} accumulate={best.accumulate}"
        + "".join(f" {change}" for change in best.changes),
        soft_wrap=True,
    )
    if best.samples != (wanted := recipe.batch * recipe.accumulate):
        console.print(f"a step then has {best.samples} samples, not the recipe's {wanted}")
