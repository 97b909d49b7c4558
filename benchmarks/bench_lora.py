"""A training step of a LoRA: forward, backward, clipping and AdamW on the adapters, the base frozen, in bfloat16.

diffusers as its training scripts have it: PEFT's adapters in float32 below autocast to bfloat16, captions padded and
masked. The same adapters, with the same weights, stand on both; the learning rate is 0, so that every round computes
the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.bench_training import TrainingPair
from benchmarks.harness import BASELINE, OURS, Bar, Case, Settings, compare, find, speedup

SUITE = "lora"
GOAL = 1.5
RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class LoraPair(TrainingPair):
    """As `TrainingPair`, of adapters alone."""

    def choose_trainable(self) -> None:
        from peft import LoraConfig

        from qwen_image_fast.training.lora import add_lora, lora_state
        from qwen_image_fast.training.recipe.flow import LoraRecipe
        from qwen_image_fast.training.trainable import choose_trainable

        add_lora(self.ours, LoraRecipe(RANK, float(RANK), targets=TARGETS))
        choose_trainable(self.ours, adapters=True)
        self.theirs.requires_grad_(False)
        self.theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        theirs, generator = dict(self.theirs.named_parameters()), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in lora_state(self.ours).items():
                if ".lora_B." in name:
                    tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
                parameter = theirs[name.removesuffix("weight") + "default.weight"]
                parameter.data = tensor.clone()  # float32, as the scripts cast them
                # The text output of the last block reaches nothing; ours freezes it.
                parameter.requires_grad_(self.ours.get_parameter(name).requires_grad)

    def by_diffusers(self) -> Tensor:
        with torch.autocast(self.texts[0].device.type, torch.bfloat16):
            return super().by_diffusers()


def released(blocks: int) -> dict:
    """The configuration of the released transformer with so many blocks."""
    from qwen_image_fast.models.transformer import QwenImageTransformer2DModel

    with torch.device("meta"):
        return {**QwenImageTransformer2DModel(num_layers=1).config, "num_layers": blocks}


def cases(settings: Settings) -> Iterator[Case]:
    chosen = [("tiny, batch 8, 128 px", 8, [0] * (4 if settings.quick else 8), None)]
    if not settings.quick:
        chosen.append(("one block of the released width, 512 px", 32, [0], released(1)))
    for name, side, references, config in chosen:
        pair = LoraPair(settings.device, side, references, torch.bfloat16, config)
        yield compare(
            SUITE, f"training step of a LoRA, {name}, bfloat16", {BASELINE: pair.by_diffusers, OURS: pair.by_ours},
            settings, tolerance=2e-2, goals={OURS: GOAL}, tags={"name": name},
            note=f"rank {RANK} on the attention of both streams; forward, backward, clipping, AdamW",
        )  # fmt: skip


def bars(measured: list[Case]) -> list[Bar]:
    names = sorted({case.tags["name"] for case in measured if case.suite == SUITE})
    return [
        Bar(f"training step of a LoRA, {name}, over diffusers", GOAL, speedup(find(measured, SUITE, name=name), OURS))
        for name in names
    ]
