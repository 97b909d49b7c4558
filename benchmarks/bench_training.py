"""A training step of the tiny transformer: forward, backward and AdamW on one batch of unequal captions.

diffusers needs one shape in a batch: captions are padded and masked, and samples with other numbers of references are
other batches, whose gradients add up. The learning rate is 0, so that every round computes the same. In bfloat16 both
sides have float32 master weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import BASELINE, OURS, Bar, Case, Settings, compare, find, speedup

SUITE = "training"
GOAL = 1.5
SEED = 0
FEWEST_TEXT, MOST_TEXT = 16, 32


class TrainingPair:
    """Two transformers with the same weights and optimisers, and a batch for both.

    Args:
        side: of the images in tokens. references: number of reference images of each sample.
        dtype: of weights and activations. config: of the transformers; None: tiny's.
    """

    def __init__(self, device: str, side: int, references: list[int], dtype: torch.dtype = torch.float32, config=None):
        from diffusers import QwenImageTransformer2DModel as Diffusers

        from qwen_image_fast.models.transformer import QwenImageTransformer2DModel
        from qwen_image_fast.tiny import tiny_configs
        from qwen_image_fast.training.engine.optimizer import Optimizer
        from qwen_image_fast.training.recipe.run import OptimizerRecipe
        from qwen_image_fast.training.tasks.flow import FlowSample

        torch.manual_seed(SEED)
        config = config or tiny_configs()["transformer"]
        self.ours = QwenImageTransformer2DModel(**config).to(device, dtype).train()
        self.theirs = Diffusers(**config).to(device, dtype).train()
        self.theirs.load_state_dict(self.ours.state_dict())
        self.optimizers = {}
        self.choose_trainable()
        for model in (self.ours, self.theirs):
            learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.optimizers[model] = Optimizer(learning, OptimizerRecipe(clip=1.0))
        shape = (1, side, side)
        tokens, channels = side * side, config["in_channels"]
        self.samples = [
            FlowSample(
                torch.randn(tokens, channels, device=device), shape, torch.randn(tokens, channels, device=device),
                float(torch.rand(())), [torch.randn(tokens, channels, device=device) for _ in range(count)],
                [shape] * count,
            )
            for count in references
        ]  # fmt: skip
        lengths = torch.randint(FEWEST_TEXT, MOST_TEXT + 1, (len(references),)).tolist()
        self.texts = [torch.randn(n, config["joint_attention_dim"], device=device, dtype=dtype) for n in lengths]
        self.groups = [[i for i, n in enumerate(references) if n == count] for count in sorted(set(references))]

    def choose_trainable(self) -> None:
        from qwen_image_fast.training.trainable import freeze_dead

        for model in (self.ours, self.theirs):
            freeze_dead(model)

    def by_ours(self) -> Tensor:
        from qwen_image_fast.training.tasks.flow import flow_losses

        loss = flow_losses(self.ours, self.samples, self.texts).mean()
        return self.update(self.ours, loss)

    def by_diffusers(self) -> Tensor:
        losses = []
        for places in self.groups:
            loss = self.padded_losses(places).sum() / len(self.samples)
            loss.backward()
            losses.append(loss.detach())
        return self.update(self.theirs, None, torch.stack(losses).sum())

    def padded_losses(self, places: list[int]) -> Tensor:
        samples, texts = [self.samples[i] for i in places], [self.texts[i] for i in places]
        sigma = torch.tensor([s.sigma for s in samples], device=texts[0].device)
        x0, eps = (torch.stack([getattr(s, name) for s in samples]) for name in ("target", "noise"))
        noisy = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * eps
        if samples[0].references:
            noisy = torch.cat([noisy, torch.stack([torch.cat(list(s.references)) for s in samples])], dim=1)
        longest = max(map(len, texts))
        padded = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, longest - len(t))) for t in texts])
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts], device=padded.device)
        shapes = [[s.shape, *s.reference_shapes] for s in samples]
        out = self.theirs(
            hidden_states=noisy.to(padded.dtype), encoder_hidden_states=padded,
            encoder_hidden_states_mask=mask, timestep=sigma,
            img_shapes=shapes, return_dict=False,
        )[0]  # fmt: skip
        return (out[:, : x0.shape[1]].float() - (eps - x0)).square().mean((1, 2))

    def update(self, model, loss: Tensor | None, value: Tensor | None = None) -> Tensor:
        if loss is not None:
            loss.backward()
            value = loss.detach()
        optimizer = self.optimizers[model]
        optimizer.accumulate()
        optimizer.clip()
        optimizer.step(0.0)
        assert value is not None
        return value


def cases(settings: Settings) -> Iterator[Case]:
    batch = 4 if settings.quick else 32
    mixed = [0, 0, 1, 2] * (batch // 4)
    for dtype in (torch.float32, torch.bfloat16):
        for side, references, name in (
            (4, [0] * batch, "64 px"),
            (8, [0] * batch, "128 px"),
            (8, mixed, "128 px, 0 to 2 references"),
        ):
            kind = str(dtype).removeprefix("torch.")
            pair = TrainingPair(settings.device, side, references, dtype)
            yield compare(
                SUITE, f"tiny training step, batch {batch}, {name}, {kind}",
                {BASELINE: pair.by_diffusers, OURS: pair.by_ours}, settings,
                tolerance=1e-4 if dtype == torch.float32 else 1e-2, goals={OURS: GOAL},
                tags={"name": name, "dtype": kind},
                note="captions of 16 to 32 tokens; forward, backward, clipping, AdamW",
            )  # fmt: skip


def bars(measured: list[Case]) -> list[Bar]:
    return [
        Bar(f"training step, {name}, {dtype}, over diffusers eager", GOAL,
            speedup(find(measured, SUITE, name=name, dtype=dtype), OURS))
        for dtype in ("float32", "bfloat16")
        for name in ("64 px", "128 px", "128 px, 0 to 2 references")
    ]  # fmt: skip
