"""The sampling loop that all pipelines share: from noise to latents on packed batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from qwen_image_fast.graphs import StepGraphs
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
    behind it in the sequence, and their shapes. layers: images of that shape, one after another in `latents`.
    image: clean latents to start from; `latents` is then the noise to mix them with. mask: 1 where the image may
    change, like `latents`; 0 keeps `image`. mu: the shift of its schedule; None: from its number of tokens.
    """

    latents: Tensor
    shape: ImageShape
    cond: Text
    uncond: Text | None = None
    references: Sequence[Tensor] = ()
    reference_shapes: Sequence[ImageShape] = ()
    layers: int = 1
    image: Tensor | None = None
    mask: Tensor | None = None
    mu: float | None = None

    @property
    def shapes(self) -> tuple[ImageShape, ...]:
        """Of all its images in the sequence."""
        return (*[self.shape] * self.layers, *self.reference_shapes)

    def noised(self, sigma: Tensor) -> Tensor:
        """`image` at a noise level, a scalar in its dtype."""
        assert self.image is not None
        return sigma * self.latents + (1.0 - sigma) * self.image


# At a step, for these latents: the residuals of ControlNets for the transformer's blocks, each [rows, width].
Residuals = Callable[[int, Tensor], Sequence[Tensor]]


class Changed(NamedTuple):
    """What a callback puts in place of the latents and the prompts' embeddings of every sample; None: kept."""

    latents: Sequence[Tensor] | None = None
    prompt_embeds: Sequence[Tensor] | None = None


# Called after every step with its index, the timestep (1000 * sigma) and the latents of every sample.
StepCallback = Callable[[int, float, list[Tensor]], "Changed | None"]


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
    begin: int = 0,
    guidance: float = 1.0,
    rescale: bool = True,
    free_weights: bool = False,
    control: Callable[[Tensor], Residuals] | None = None,
    graphs: StepGraphs | None = None,
    on_step: StepCallback | None = None,
    progress: bool = True,
    bar_options: Mapping[str, Any] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Tensor]:
    """Latents of every sample after all steps.

    All samples, and both branches of classifier-free guidance, run as one packed batch without padding; each keeps the
    schedule of its own size. Modulation vectors of all steps are computed first; `free_weights` then releases the
    weights that made them. `begin`: the first step that is taken. `control`: given the noise
    levels of the samples, float32 [steps, samples], the residuals of ControlNets. With `graphs`, the transformer's
    passes are captured and replayed, where no ControlNet adds to them. `bar_options`: of tqdm, beside `progress`.
    """
    device, config = samples[0].latents.device, transformer.config
    guided = samples[0].uncond is not None
    branches = 2 if guided else 1
    texts = [s.cond for s in samples] + [s.uncond for s in samples if s.uncond is not None]
    layout = pack(
        tuple(s.shapes for s in samples) * branches,
        [len(t.embeds) for t in texts],
        axes_dim=config.axes_dims_rope,
        layer3d=config.use_layer3d_rope,
        zero_cond_t=config.zero_cond_t,
        txt_positions=None if all(t.positions is None for t in texts) else [
            torch.arange(len(t.embeds)) if t.positions is None else t.positions.cpu() for t in texts
        ],
        targets=[s.layers for s in samples] * branches,
        device=device,
    )  # fmt: skip

    lengths = [len(s.latents) for s in samples]
    shifts = [schedule_shift(scheduler, n) if s.mu is None else s.mu for s, n in zip(samples, lengths)]
    levels = {mu: noise_levels(scheduler, mu, steps, sigmas) for mu in dict.fromkeys(shifts)}
    schedule = torch.stack([levels[mu] for mu in (dict.fromkeys(shifts) if len(levels) == 1 else shifts)], 1)
    # One value for all samples where they share a schedule, else one for each.
    dt = schedule.diff(dim=0).to(device)
    offsets = None if len(levels) == 1 else cumulative(lengths, device)
    modulations = StepModulations(transformer, levels, shifts * branches, free_weights)

    sample_levels = torch.stack([levels[mu] for mu in shifts], 1)
    residuals = None if control is None else control(sample_levels[:-1])
    starts = sample_levels[begin].to(samples[0].latents)
    x = torch.cat([s.latents if s.image is None else s.noised(sigma) for s, sigma in zip(samples, starts)])
    txt = transformer.embed_text(torch.cat([t.embeds for t in texts]))
    rows = len(x)
    shown: dict[str, Any] = {"total": len(dt) - begin, "desc": "denoise", "unit": "step"}
    shown |= {"disable": not progress, **(bar_options or {})}
    if residuals is not None:
        graphs = None
    if graphs is not None:
        graphs.start(transformer)
    with tqdm(**shown) as bar:
        for i in range(begin, len(dt)):
            if interrupted():
                break
            img = torch.cat([part for own, s in zip(x.split(lengths), samples) for part in (own, *s.references)])
            inputs = torch.cat([img] * branches), txt, layout, modulations.at(i)
            if graphs is not None:
                out = graphs.forward(transformer, *inputs)
            else:
                added = None if residuals is None else [torch.cat([r] * branches) for r in residuals(i, x)]
                out = transformer.forward_packed(*inputs, added)
            x = guided_step(x, out[:rows], out[rows:] if guided else None, dt[i], guidance, rescale, offsets)
            if any(s.mask is not None for s in samples):
                x = keep_masked(x.split(lengths), samples, sample_levels[i + 1])
            if on_step is not None:
                changed = on_step(i - begin, float(schedule[i, 0]) * 1000, list(x.split(lengths))) or Changed()
                if changed.latents is not None:
                    x = torch.cat([c.to(x) for c in changed.latents])
                if changed.prompt_embeds is not None:
                    for s, embeds in zip(samples, changed.prompt_embeds):
                        s.cond = Text(embeds.to(s.cond.embeds), s.cond.positions)
                    texts[: len(samples)] = [s.cond for s in samples]
                    txt = transformer.embed_text(torch.cat([t.embeds for t in texts]))
                    residuals = None if control is None else control(sample_levels[:-1])
            bar.update()
    return list(x.split(lengths))


def keep_masked(latents: Sequence[Tensor], samples: Sequence[Sample], sigmas: Tensor) -> Tensor:
    """(1 - mask) image_sigma + mask latents of each sample that has a mask, at its noise level of `sigmas`."""
    parts = []
    for x, sample, sigma in zip(latents, samples, sigmas.to(latents[0])):
        if sample.mask is not None:
            x = (1 - sample.mask) * sample.noised(sigma) + sample.mask * x
        parts.append(x)
    return torch.cat(parts)


class StepModulations:
    """The modulation vectors of each step, from one table over all schedules of the batch."""

    def __init__(self, transformer, levels: dict[float, Tensor], shifts: Sequence[float], free_weights: bool):
        self.zero_cond_t = transformer.config.zero_cond_t
        self.steps = len(next(iter(levels.values()))) - 1
        noise = [float(sigma) for schedule in levels.values() for sigma in schedule[:-1]]
        noise = [*noise, 0.0] if self.zero_cond_t else noise
        # The Layered model's flag of RGB images; all of its images are RGBA.
        flag = 0 if transformer.config.use_additional_t_cond else None
        table = transformer.modulation_tables.get(transformer, noise, flag)
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
