"""The sampling loop that all pipelines share: from noise to latents on packed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from qwen_image_fast.models.modulation import Modulation, free_modulation_weights
from qwen_image_fast.models.packing import cumulative, pack
from qwen_image_fast.models.rope import ImageShape
from qwen_image_fast.ops.guided_step import guided_step
from qwen_image_fast.schedulers import calculate_shift


@dataclass
class Text:
    """The condition of one sample: embeds [tokens, joint_attention_dim]; positions of the tokens, None: 0, 1, 2, ..."""

    embeds: Tensor
    positions: Tensor | None = None


@dataclass
class Sample:
    """One image to make.

    latents: [tokens, channels] packed noise. shape: (frames, height, width) in tokens. cond, uncond: its conditions;
    uncond None: no classifier-free guidance. references, reference_shapes: packed latents of 0..N images that stand
    behind it in the sequence, and their shapes.
    """

    latents: Tensor
    shape: ImageShape
    cond: Text
    uncond: Text | None = None
    references: Sequence[Tensor] = ()
    reference_shapes: Sequence[ImageShape] = ()


# Called after every step with its index, the timestep (1000 * sigma) and the latents of every sample; may return
# replacements for them.
StepCallback = Callable[[int, float, list[Tensor]], "list[Tensor] | None"]


def schedule_shift(scheduler, tokens: int) -> float:
    """mu of an image of `tokens` tokens, from the scheduler's configuration (diffusers' defaults where it has none)."""
    config = scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def noise_levels(scheduler, mu: float, steps: int, sigmas: Sequence[float] | None = None) -> Tensor:
    """The schedule shifted by `mu`, float32 [steps + 1] on the CPU."""
    if getattr(scheduler.config, "stochastic_sampling", False):
        raise ValueError("the scheduler must not use stochastic_sampling: this loop takes deterministic Euler steps")
    levels = np.linspace(1.0, 1 / steps, steps).tolist() if sigmas is None else list(sigmas)
    scheduler.set_timesteps(sigmas=levels, mu=mu)
    return scheduler.sigmas.cpu()


def denoise(
    transformer,
    scheduler,
    samples: Sequence[Sample],
    *,
    steps: int,
    sigmas: Sequence[float] | None = None,
    guidance: float = 1.0,
    rescale: bool = True,
    free_weights: bool = False,
    on_step: StepCallback | None = None,
    progress: bool = True,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Latents of every sample after all steps.

    All samples, and both branches of classifier-free guidance, run as one packed batch without padding; each keeps the
    schedule of its own size. Modulation vectors of all steps are computed first; `free_weights` then releases the
    weights that made them.
    """
    device, config = samples[0].latents.device, transformer.config
    guided = samples[0].uncond is not None
    branches = 2 if guided else 1
    texts = [s.cond for s in samples] + [s.uncond for s in samples if s.uncond is not None]
    layout = pack(
        tuple((s.shape, *s.reference_shapes) for s in samples) * branches,
        [len(t.embeds) for t in texts],
        axes_dim=config.axes_dims_rope,
        layer3d=config.use_layer3d_rope,
        zero_cond_t=config.zero_cond_t,
        txt_positions=None if all(t.positions is None for t in texts) else [
            torch.arange(len(t.embeds)) if t.positions is None else t.positions.cpu() for t in texts
        ],
        targets_only=True,
        device=device,
    )  # fmt: skip

    lengths = [len(s.latents) for s in samples]
    shifts = [schedule_shift(scheduler, n) for n in lengths]
    levels = {mu: noise_levels(scheduler, mu, steps, sigmas) for mu in dict.fromkeys(shifts)}
    schedule = torch.stack([levels[mu] for mu in (dict.fromkeys(shifts) if len(levels) == 1 else shifts)], 1)
    # One value for all samples where they share a schedule, else one for each.
    dt = schedule.diff(dim=0).to(device)
    offsets = None if len(levels) == 1 else cumulative(lengths, device)
    modulations = StepModulations(transformer, levels, shifts * branches, free_weights)

    x = torch.cat([s.latents for s in samples])
    txt = transformer.embed_text(torch.cat([t.embeds for t in texts]))
    rows = len(x)
    with tqdm(total=len(dt), disable=not progress, desc="denoise", unit="step") as bar:
        for i in range(len(dt)):
            if interrupted():
                break
            img = torch.cat([part for own, s in zip(x.split(lengths), samples) for part in (own, *s.references)])
            out = transformer.forward_packed(torch.cat([img] * branches), txt, layout, modulations.at(i))
            x = guided_step(x, out[:rows], out[rows:] if guided else None, dt[i], guidance, rescale, offsets)
            if on_step is not None:
                changed = on_step(i, float(schedule[i, 0]) * 1000, list(x.split(lengths)))
                x = x if changed is None else torch.cat([c.to(x) for c in changed])
            bar.update()
    return list(x.split(lengths))


class StepModulations:
    """The modulation vectors of each step, from one table over all schedules of the batch."""

    def __init__(self, transformer, levels: dict[float, Tensor], shifts: Sequence[float], free_weights: bool):
        self.zero_cond_t = transformer.config.zero_cond_t
        self.steps = len(next(iter(levels.values()))) - 1
        noise = [float(sigma) for schedule in levels.values() for sigma in schedule[:-1]]
        table = transformer.modulation_tables.get(transformer, [*noise, 0.0] if self.zero_cond_t else noise)
        if free_weights:
            free_modulation_weights(transformer, table)
        self.table = table
        self.rows = None
        if len(levels) > 1:
            first = {mu: k * self.steps for k, mu in enumerate(levels)}
            self.rows = torch.tensor([first[mu] for mu in shifts], device=table.final.device)
        elif self.zero_cond_t:
            self.rows = torch.zeros(len(shifts), dtype=torch.int64, device=table.final.device)

    def at(self, step: int) -> Modulation:
        """One condition for the whole batch where all samples share it, else one per segment of the layout."""
        if self.rows is None:
            return self.table.select(slice(step, step + 1))
        chosen = self.table.select(self.rows + step)
        return chosen.with_references(self.table.select(slice(-1, None))) if self.zero_cond_t else chosen
