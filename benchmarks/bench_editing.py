"""A step of editing with two references, at tiny width and with one block of the released width, and LoRA swaps.

The step of one block is a whole transformer step, whose only block is the last one: it computes the generated image's
rows alone. A middle block computes all rows; of 60 blocks, 59 are such.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bench_block import BlockPair, one_case
from benchmarks.bench_pipeline import diffusers_pipeline
from benchmarks.bench_transformer import StepPair, step_case
from benchmarks.harness import BASELINE, OURS, Bar, Case, Settings, compare, find, resident_bytes, speedup

SUITE = "editing"
GOAL_TINY, GOAL_BLOCK = 1.3, 1.15
SWAP_SECONDS = 0.05
SWAPS = 100
NAMES = ("red", "blue")


def cases(settings: Settings, heads: int = 24, grid: tuple[int, int] = (16, 16), txt: int = 64) -> Iterator[Case]:
    from qwen_image_fast.models.transformer_block import run_block

    torch.manual_seed(0)
    with torch.inference_mode():
        yield step_case(
            settings, StepPair(settings.device, references=2), 2, "tiny edit step, two references, CFG pair", SUITE,
            goals={OURS: GOAL_TINY},
        )  # fmt: skip
        real = {"num_layers": 1, "num_attention_heads": heads, "attention_head_dim": 128}
        real |= {"axes_dims_rope": (16, 56, 56), "joint_attention_dim": heads * 448 // 3}
        pair = StepPair(settings.device, grid, references=2, **real)
        name = f"edit step of one block of width {heads * 128}, two references, CFG pair"
        yield step_case(settings, pair, 2, name, SUITE, goals={OURS: GOAL_BLOCK})
        weights = pair.theirs.transformer_blocks[0].state_dict()
        block = BlockPair(settings.device, heads, grid, txt, weights, references=2)
        yield one_case(settings, block, run_block, SUITE)
    yield swap_case(settings)


def adapters(layers: dict[str, torch.nn.Linear], seed: int, rank: int = 8) -> dict[str, torch.Tensor]:
    """A LoRA on every given layer."""
    torch.manual_seed(seed)
    state = {}
    for name, layer in layers.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) / layer.in_features**0.5
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) / rank
    return state


def swap_case(settings: Settings) -> Case:
    """Switching between two loaded adapters on every linear layer of the tiny transformer."""
    from qwen_image_fast.pipelines.text_to_image import QwenImagePipeline
    from qwen_image_fast.tiny import write_untrained

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tiny"
        write_untrained(folder)
        ours = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32).to(settings.device)
        theirs = diffusers_pipeline(folder, settings.device)
    layers = {n: m for n, m in ours.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    for seed, name in enumerate(NAMES):
        for pipe in (ours, theirs):
            pipe.load_lora_weights(adapters(layers, seed), adapter_name=name)

    def swaps(pipe):
        """A call that activates the adapter that is not; what a layer computes with it is the result."""
        names = itertools.cycle(NAMES)
        x = torch.ones(1, pipe.transformer.inner_dim, device=settings.device)

        def swap():
            pipe.set_adapters([next(names)])
            return pipe.transformer.transformer_blocks[0].attn.to_q(x)

        return swap

    variants = {BASELINE: swaps(theirs), OURS: swaps(ours)}
    with torch.inference_mode():
        case = compare(
            SUITE, f"swapping a LoRA of rank 8 on {len(layers)} layers of the tiny model", variants, settings,
            tolerance=1e-4, tags={"adapters": len(NAMES)}, note=f"memory: resident growth over {SWAPS} swaps",
        )  # fmt: skip
        for name, call in variants.items():
            before = resident_bytes("VmRSS")
            for _ in range(SWAPS):
                call()
            case.memory[name] = max(0, resident_bytes("VmRSS") - before)
    return case


def bars(measured: list[Case]) -> list[Bar]:
    step = {width: find(measured, SUITE, references=2, width=width) for width in (192, 3072)}
    swap = find(measured, SUITE, adapters=len(NAMES))
    spent = None if swap is None else swap.timings[OURS].median / SWAP_SECONDS
    return [
        Bar("tiny edit step, two references, over diffusers eager", GOAL_TINY, speedup(step[192], OURS)),
        Bar("edit step of one block, width 3072, over diffusers eager", GOAL_BLOCK, speedup(step[3072], OURS)),
        Bar("tiny LoRA swap, time over 50 ms", 1.0, spent, at_most=True),
    ]
